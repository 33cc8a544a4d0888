//! Bytes that each operation has to move, for benches and statistics.
