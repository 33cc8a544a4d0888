//! An audited token: the ordinary one, which leaves what its MLPs saw, and after it one kernel that looks at drawn rows.
//!
//! The rows are drawn while the token runs. Squared norms of the rows of W_down are the model's, so they are made once,
//! at the first audit, and audits read no row of it.

use kernels::cuda::{
    AuditCall, AuditLayer, AuditRecord, AuditScratch, CudaError, Graph, HostBuffer, audit_of,
};
use kernels::{MlpCounts, bytes};

use super::{CudaEngine, ModelState};
use crate::RuntimeError;
use crate::audit::{Audit, ROW_BLOCK};
use crate::session::Usage;

/// Where a row of the sample is none.
const NO_ROW: u32 = u32::MAX;

/// What audits need beside tokens.
#[derive(Debug)]
pub(super) struct Audits {
    /// The token that leaves a trace. It names the buffers below, so it is dropped first.
    graph: Option<Graph>,
    scratch: AuditScratch,
    /// Rows of all layers on their way to the device.
    sample: HostBuffer,
    /// Records of all layers as they came from it.
    records: Vec<AuditRecord>,
}

impl Audits {
    fn new(state: &ModelState<'_>) -> Result<Self, CudaError> {
        let layers = &state.weights.layers;
        let (n_layers, d) = (layers.len(), state.weights.embedding.n_cols);
        let f = layers.first().map_or(0, |w| w.mlp.gate.n_rows);
        let n_drawn = f.div_ceil(ROW_BLOCK);
        let scratch = state.device.audit_scratch(n_layers, d, f, n_drawn)?;
        for (layer, w) in layers.iter().enumerate() {
            state.device.squared_norms(&state.matrix(&w.mlp.down_t)?, scratch.norms(layer))?;
        }
        Ok(Self {
            graph: None,
            sample: state.device.alloc_host(n_layers * n_drawn * size_of::<u32>())?,
            records: vec![AuditRecord::default(); n_layers * scratch.n_blocks()],
            scratch,
        })
    }

    /// For rows that are chosen otherwise.
    pub(super) fn drop_graph(&mut self) {
        self.graph = None;
    }
}

impl CudaEngine<'_> {
    /// One token at `position` and its audit; neither has been waited for.
    pub(super) fn step_audited(
        &mut self,
        token: u32,
        position: usize,
        audit: &mut Audit,
        number: usize,
    ) -> Result<(), RuntimeError> {
        // Before the rows are drawn: those of the last audit may still be on their way, if that failed.
        self.state.device.synchronize()?;
        self.place(token, position)?;
        self.state.bring_limits(&self.rows)?;
        let state = &self.state;
        let audits = match &mut self.audits {
            Some(audits) => audits,
            None => self.audits.insert(Audits::new(state)?),
        };
        let graph = match &mut audits.graph {
            Some(graph) => graph,
            None => {
                let trace = Some(audits.scratch.trace());
                // SAFETY: the graph is dropped before the scratch and the buffers of `state`, by the order of fields, and
                // before those that go earlier, by `set_rows` and `set_predictors`.
                let graph = unsafe { state.device.capture(|| state.token(&self.rows, None, trace)) }?;
                audits.graph.insert(graph)
            }
        };
        state.device.replay(graph)?;
        draw(audit, number, state.weights.layers.len(), bytemuck::cast_slice_mut(audits.sample.bytes_mut()));
        // SAFETY: the rows stay until the next audit has waited for the device; so does the buffer, whose drop waits.
        unsafe { state.device.write_later(audits.scratch.sample(), &audits.sample) }?;
        let layers = state
            .weights
            .layers
            .iter()
            .enumerate()
            .map(|(layer, w)| {
                let of = || -> Result<AuditLayer<'_>, CudaError> {
                    Ok(AuditLayer { w_gate: state.matrix(&w.mlp.gate)?, w_up: state.matrix(&w.mlp.up)? })
                };
                audit.predicts(layer).then(of).transpose()
            })
            .collect::<Result<Vec<_>, CudaError>>()?;
        let (activation, scratch) = (state.activation, &audits.scratch);
        Ok(state.device.audit(&AuditCall { layers: &layers, activation, scratch })?)
    }

    /// Waits for the device; tells `audit` what the last step found, and `usage` what that read. `counts` are the token's.
    pub(super) fn record_audit(
        &mut self,
        counts: &[MlpCounts],
        usage: &mut Usage,
        audit: &mut Audit,
        number: usize,
    ) -> Result<(), RuntimeError> {
        let audits = self.audits.as_mut().expect("step_audited makes them");
        self.state.device.read(audits.scratch.records(), &mut audits.records)?;
        let records = audits.records.chunks_exact(audits.scratch.n_blocks());
        for (layer, ((records, counts), w)) in records.zip(counts).zip(&self.state.weights.layers).enumerate()
        {
            if audit.predicts(layer) {
                let found = audit_of(records);
                audit.record(number, layer, counts, &found);
                // The rows of W_down count as they do on a CPU, which reads them.
                usage.n_bytes += bytes::audit(&w.mlp, &found);
            }
        }
        Ok(())
    }
}

/// `sample (n_layers, n_drawn)` becomes the rows of audit `number` in the layers that predict; the others keep theirs.
fn draw(audit: &mut Audit, number: usize, n_layers: usize, sample: &mut [u32]) {
    let n_drawn = sample.len() / n_layers;
    for (layer, sample) in sample.chunks_exact_mut(n_drawn).enumerate() {
        if audit.predicts(layer) {
            let drawn = audit.draw(number, layer);
            sample[..drawn.len()].copy_from_slice(drawn);
            sample[drawn.len()..].fill(NO_ROW);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::AuditOptions;

    #[test]
    fn rows_of_each_layer_are_those_of_the_audit_and_none_fill_up() {
        let options = AuditOptions { every: 1, seed: 5, adaptive: false };
        // The last of the 26 blocks has one row, which is drawn once in four times.
        let (n_rows, n_drawn, n_tokens) = (101, 26, 40);
        let mut audit = Audit::new(options, vec![true, false, true], n_rows, n_tokens);
        let mut n_filled = 0;
        for number in 0..n_tokens {
            assert_eq!(audit.next_token(), Some(number));
            let mut sample = vec![7; 3 * n_drawn];
            draw(&mut audit, number, 3, &mut sample);
            assert_eq!(sample[n_drawn..2 * n_drawn], [7; 26]);
            for layer in [0, 2] {
                let rows = &sample[layer * n_drawn..][..n_drawn];
                let drawn = audit.draw(number, layer);
                assert_eq!(&rows[..drawn.len()], drawn);
                assert!(rows[drawn.len()..].iter().all(|&row| row == NO_ROW));
                n_filled += n_drawn - drawn.len();
            }
        }
        assert!(n_filled > n_tokens && n_filled < 2 * n_tokens, "{n_filled}");
    }
}
