//! Sign words: bit order, padding, and the rule for zero and NaN.
