//! What a token needs and takes, step by step of its kernel.
//!
//! Each token runs twice, which leaves the cache as one run does: as a graph that the device times, then once more with
//! clocks, which say how that time divides. So counting clocks slows nothing that is reported.

use kernels::cuda::{DECODE_STEPS, Dtype, ReadingStep, step_times};
use kernels::{MlpCounts, bytes};

use super::CudaEngine;
use super::decode::Way;
use crate::RuntimeError;
use crate::engine::RowChoice;
use crate::forward::rows_of;
use crate::stats::ratio;
use crate::steps::Step;

/// Bytes that each step needed: weights, sign words and cache, each once.
pub(super) type StepBytes = [u64; DECODE_STEPS.len()];

impl CudaEngine<'_> {
    /// What a token at `position` needed, given the rows that its layers counted.
    pub(super) fn step_bytes(&self, position: usize, counts: &[MlpCounts]) -> StepBytes {
        let state = &self.state;
        let mut step_bytes = [0; DECODE_STEPS.len()];
        let mut add = |step: ReadingStep, n_bytes: u64| step_bytes[step as usize] += n_bytes;
        let cache = Dtype::of(&state.weights.embedding.data).cache().n_bytes();
        let kv_bytes = bytes::kv(&state.shape, cache, position + 1);
        for ((w, rows), counts) in state.weights.layers.iter().zip(&self.rows).zip(counts) {
            let mlp = bytes::MlpBytes::new(&w.mlp, &rows_of(rows, w), counts);
            add(ReadingStep::Qkv, [&w.w_q, &w.w_k, &w.w_v].map(bytes::matrix).iter().sum());
            add(ReadingStep::Attention, kv_bytes);
            add(ReadingStep::Output, bytes::matrix(&w.w_o));
            add(ReadingStep::Predictor, mlp.predictor);
            let (gate, up) = mlp_steps(rows);
            add(gate, mlp.gate);
            add(up, mlp.up);
            add(ReadingStep::Down, mlp.down);
        }
        add(ReadingStep::LmHead, bytes::matrix(&state.weights.lm_head));
        step_bytes
    }

    /// Decodes `tokens` from `first_position` on; none where a token is a run of single kernels.
    pub(super) fn time_kernel_steps(
        &mut self,
        tokens: &[u32],
        first_position: usize,
    ) -> Result<Vec<Step>, RuntimeError> {
        let Way::OneKernel(scratch) = &self.state.way else { return Ok(Vec::new()) };
        let mut clocks = vec![0u64; scratch.n_blocks() * DECODE_STEPS.len()];
        let device_clocks = self.state.device.upload(&clocks)?;
        // Ahead of the times: recording the graph, and its first run.
        if let Some(&token) = tokens.first() {
            self.step(token, first_position)?;
            self.take_counts()?;
        }
        let mut token_us = 0.0;
        let mut n_bytes = [0; DECODE_STEPS.len()];
        for (position, &token) in (first_position..).zip(tokens) {
            self.place(token, position)?;
            let start = self.state.device.record()?;
            self.run_placed()?;
            token_us += 1e3 * self.state.device.record()?.ms_since(&start)?;
            let counts = self.take_counts()?;
            for (sum, n_bytes) in n_bytes.iter_mut().zip(self.step_bytes(position, &counts)) {
                *sum += n_bytes;
            }
            self.place(token, position)?;
            self.state.token(&self.rows, Some(device_clocks.view()), None)?;
            // The same rows, not to be counted twice.
            self.take_counts()?;
        }
        self.state.device.read(device_clocks.view(), &mut clocks)?;
        let n_tokens = tokens.len() as f64;
        let times = step_times(&clocks, ratio(token_us, n_tokens));
        let steps = DECODE_STEPS.into_iter().zip(times).zip(n_bytes);
        Ok(steps
            .map(|((name, time), n_bytes)| Step {
                name,
                us_per_token: time.mean_us,
                bytes_per_token: ratio(n_bytes as f64, n_tokens),
            })
            .collect())
    }
}

/// The steps that read a layer's rows of gate and up.
fn mlp_steps(rows: &RowChoice) -> (ReadingStep, ReadingStep) {
    match rows {
        RowChoice::All => (ReadingStep::AllGateRows, ReadingStep::AllGateRows),
        RowChoice::Active => (ReadingStep::AllGateRows, ReadingStep::ActiveUpRows),
        RowChoice::Limit(_)
        | RowChoice::RowLimits(_)
        | RowChoice::Threshold(_)
        | RowChoice::RowThresholds(_) => (ReadingStep::KeptGateRows, ReadingStep::ActiveUpRows),
    }
}
