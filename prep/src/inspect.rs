//! `prep inspect`: what is in a file, for people and for programs.

use std::io::{self, Write};
use std::path::Path;

use format_spec::{
    Activation, DummyPrefix, ModelConfig, PredictorKind, PredictorRecord, Provenance, RopeScaling, Tokenizer,
};
use runtime::Model;
use serde::Serialize;

use crate::PrepError;

/// What is in a file.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The file.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// `major.minor`.
    pub format_version: String,
    /// Digest of the whole file, as it states; `prep verify` recomputes it.
    pub blake3: String,
    /// Dimensions and constants, in the words of config.json.
    pub config: ConfigRow,
    /// Bytes by kind of section, in the order of the file.
    pub sizes: Vec<SizeRow>,
    /// One for each layer.
    pub predictors: Vec<PredictorRow>,
    /// Calibration curves, one for each layer; none if the file has none.
    pub n_curve_points: Option<usize>,
    /// The vocabulary.
    pub tokenizer: TokenizerRow,
    /// Where the file came from, if it says so.
    pub provenance: Option<ProvenanceRow>,
    /// Every section, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensors: Option<Vec<TensorRow>>,
}

/// Dimensions and constants.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the fields are those of config.json")]
pub struct ConfigRow {
    pub hidden_size: u32,
    pub intermediate_size: u32,
    pub num_hidden_layers: u32,
    pub num_attention_heads: u32,
    pub num_key_value_heads: u32,
    pub head_dim: u32,
    pub vocab_size: u32,
    pub max_position_embeddings: u32,
    pub rms_norm_eps: f32,
    /// `relu`, `fatrelu` or `silu`.
    pub hidden_act: &'static str,
    /// Threshold of fatrelu.
    pub hidden_act_param: Option<f32>,
    pub rope_theta: f64,
    /// Factor of linear RoPE scaling.
    pub rope_factor: Option<f64>,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

/// Sections of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct SizeRow {
    /// Name of the kind.
    pub kind: &'static str,
    /// Element type.
    pub dtype: &'static str,
    /// Sections of this kind and type.
    pub sections: usize,
    /// Their bytes, without padding.
    pub bytes: u64,
}

/// One layer's predictor. Statistics that were not measured are absent.
#[derive(Clone, Debug, Serialize)]
pub struct PredictorRow {
    /// Layer.
    pub layer: usize,
    /// `exact`, `sign`, `sign_per_row`, `sign_x8`, `w2`, `w3`, `low_rank`,
    /// `low_rank_relu` or `low_rank_sign`.
    pub kind: &'static str,
    /// Largest n_neg that is still computed, where the layer has one.
    pub limit: Option<u32>,
    /// Smallest score that is still computed, where the layer has scores.
    pub threshold: Option<f32>,
    /// The ratio that folds into the limit; absent if every row is kept.
    pub alpha: Option<f32>,
    /// Share of rows that are active.
    pub rows_active: Option<f32>,
    /// Share of rows kept.
    pub rows_kept: Option<f32>,
    /// Share of active rows kept.
    pub recall: Option<f32>,
    /// Share of MLP output energy missed.
    pub missed_energy: Option<f32>,
    /// Calibration tokens behind the statistics.
    pub n_tokens: u32,
}

/// The vocabulary.
#[derive(Clone, Debug, Serialize)]
pub struct TokenizerRow {
    /// Entries with a spelling.
    pub pieces: usize,
    /// Merges.
    pub merges: usize,
    /// Tokens matched whole.
    pub added_tokens: usize,
    /// Where a space is put in front: `never`, `every_stretch` or `first`.
    pub dummy_prefix: &'static str,
    /// BOS is put before a text.
    pub add_bos: bool,
    /// EOS is put after a text.
    pub add_eos: bool,
}

/// Where a file came from.
#[derive(Clone, Debug, Serialize)]
pub struct ProvenanceRow {
    /// Name of the model folder.
    pub source_name: String,
    /// What was read from it.
    pub source_files: Vec<SourceRow>,
    /// Program and version.
    pub tool: String,
    /// Options that changed the output.
    pub options: Vec<(String, String)>,
    /// Calibration text.
    pub calibration: Option<CalibrationRow>,
}

/// A file that was read.
#[derive(Clone, Debug, Serialize)]
pub struct SourceRow {
    /// Name.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Digest, as `b3sum` prints it.
    pub blake3: String,
}

/// A calibration text.
#[derive(Clone, Debug, Serialize)]
pub struct CalibrationRow {
    /// File name, or `built-in`.
    pub name: String,
    /// Digest, as `b3sum` prints it.
    pub blake3: String,
    /// Tokens used.
    pub n_tokens: u64,
    /// Tokens in one window.
    pub window: u32,
}

/// A section.
#[derive(Clone, Debug, Serialize)]
pub struct TensorRow {
    /// Name of its kind.
    pub name: &'static str,
    /// Layer, for the per-layer kinds.
    pub layer: Option<u32>,
    /// Element type.
    pub dtype: &'static str,
    /// Dimensions in elements, outermost first.
    pub shape: Vec<u64>,
    /// Start in the file.
    pub offset: u64,
    /// Length without padding.
    pub bytes: u64,
    /// XXH3-64 of its bytes.
    pub xxh3: String,
}

/// Opens `path`, which checks its structure, and says what is in it; every section if `with_tensors`.
///
/// # Errors
/// [`PrepError::Runtime`] for a file that cannot be opened or breaks a rule.
pub fn inspect(path: &Path, with_tensors: bool) -> Result<Inspection, PrepError> {
    Inspection::of(&Model::open(path)?, with_tensors)
}

impl Inspection {
    /// What is in `model`'s file; every section if `with_tensors`.
    pub(crate) fn of(model: &Model, with_tensors: bool) -> Result<Self, PrepError> {
        let (layout, file) = (model.layout(), model.bytes());
        let in_file = |error| model.error(error);
        let tokenizer = layout.tokenizer(file).map_err(in_file)?;
        let provenance = layout.provenance(file).map_err(in_file)?;
        let curves = layout.calibration_curves(file).map_err(in_file)?;
        let (major, minor) = layout.version();
        let tensors = layout.sections().iter().map(|section| TensorRow {
            name: section.kind.name(),
            layer: section.layer,
            dtype: section.dtype.name(),
            shape: section.shape.dims().to_vec(),
            offset: section.offset_bytes,
            bytes: section.len_bytes,
            xxh3: format!("{:016x}", section.xxh3),
        });
        let tensors: Vec<TensorRow> = tensors.collect();
        Ok(Inspection {
            path: model.path().to_owned(),
            bytes: file.len() as u64,
            format_version: format!("{major}.{minor}"),
            blake3: hex(&layout.digest()),
            config: ConfigRow::new(model.config()),
            sizes: SizeRow::sums(&tensors),
            predictors: PredictorRow::all(layout.predictors()),
            n_curve_points: curves.and_then(|curves| curves.first().map(Vec::len)),
            tokenizer: TokenizerRow::new(&tokenizer),
            provenance: provenance.map(ProvenanceRow::new),
            tensors: with_tensors.then_some(tensors),
        })
    }

    /// The inspection for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        let config = &self.config;
        writeln!(out, "{}", self.path)?;
        writeln!(out, "  .sinf {}, {}, blake3 {}", self.format_version, size(self.bytes), self.blake3)?;
        if let Some(provenance) = &self.provenance {
            provenance.write_text(out)?;
        }

        writeln!(out, "\nmodel")?;
        writeln!(
            out,
            "  hidden_size {}, intermediate_size {}, {} layers, {} heads ({} key/value) of {}, vocab_size {}{}",
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
            if config.tie_word_embeddings { ", tied embeddings" } else { "" }
        )?;
        let threshold = config.hidden_act_param.map(|value| format!(" {value}")).unwrap_or_default();
        let factor = config.rope_factor.map(|value| format!(" / {value}")).unwrap_or_default();
        writeln!(
            out,
            "  activation {}{threshold}, RoPE {}{factor}, context {}, rms_norm_eps {}",
            config.hidden_act, config.rope_theta, config.max_position_embeddings, config.rms_norm_eps
        )?;
        let tokenizer = &self.tokenizer;
        writeln!(
            out,
            "  tokenizer: {} pieces, {} merges, {} added tokens, dummy prefix {}, BOS {}{}, EOS {:?}{}",
            tokenizer.pieces,
            tokenizer.merges,
            tokenizer.added_tokens,
            tokenizer.dummy_prefix,
            config.bos_token_id.map_or_else(|| "none".to_owned(), |id| id.to_string()),
            if tokenizer.add_bos { " added" } else { "" },
            config.eos_token_ids,
            if tokenizer.add_eos { " added" } else { "" },
        )?;

        writeln!(out, "\nsections             dtype  number          bytes")?;
        for row in &self.sizes {
            writeln!(out, "  {:18} {:5} {:7}  {:>13}", row.kind, row.dtype, row.sections, size(row.bytes))?;
        }
        writeln!(out)?;
        PredictorRow::write_table(&self.predictors, out)?;
        if let Some(tensors) = &self.tensors {
            writeln!(
                out,
                "\nlayer  name               dtype           shape          offset           bytes  xxh3"
            )?;
            for row in tensors {
                let layer = row.layer.map(|layer| layer.to_string()).unwrap_or_default();
                let shape = row.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
                writeln!(
                    out,
                    "{layer:>5}  {:18} {:5} {shape:>15} {:>15} {:>15}  {}",
                    row.name, row.dtype, row.offset, row.bytes, row.xxh3
                )?;
            }
        }
        Ok(())
    }
}

impl ConfigRow {
    fn new(config: &ModelConfig) -> Self {
        let (hidden_act, hidden_act_param) = match config.activation {
            Activation::Relu => ("relu", None),
            Activation::FatRelu { threshold } => ("fatrelu", Some(threshold)),
            Activation::Silu => ("silu", None),
        };
        Self {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_position_embeddings: config.max_position_embeddings,
            rms_norm_eps: config.rms_norm_eps,
            hidden_act,
            hidden_act_param,
            rope_theta: config.rope.theta,
            rope_factor: match config.rope.scaling {
                RopeScaling::None => None,
                RopeScaling::Linear { factor } => Some(factor),
            },
            tie_word_embeddings: config.tie_word_embeddings,
            bos_token_id: config.bos_token_id,
            eos_token_ids: config.eos_token_ids.clone(),
        }
    }
}

impl SizeRow {
    /// Sums by kind and type, in the order in which they first come.
    fn sums(tensors: &[TensorRow]) -> Vec<Self> {
        let mut rows: Vec<Self> = Vec::new();
        for tensor in tensors {
            let known = rows.iter().position(|row| (row.kind, row.dtype) == (tensor.name, tensor.dtype));
            let at = known.unwrap_or_else(|| {
                rows.push(Self { kind: tensor.name, dtype: tensor.dtype, sections: 0, bytes: 0 });
                rows.len() - 1
            });
            rows[at].sections += 1;
            rows[at].bytes += tensor.bytes;
        }
        rows
    }
}

impl PredictorRow {
    /// Rows of all layers.
    pub(crate) fn all(records: &[PredictorRecord]) -> Vec<Self> {
        records.iter().enumerate().map(|(layer, record)| Self::new(layer, record)).collect()
    }

    fn new(layer: usize, record: &PredictorRecord) -> Self {
        let finite = |value: f32| Some(value).filter(|value| value.is_finite());
        let kind = if record.kind == PredictorKind::Off { "exact" } else { record.kind.name() };
        let is_sign = record.kind == PredictorKind::Sign;
        Self {
            layer,
            kind,
            limit: is_sign.then_some(record.limit),
            threshold: record.kind.has_score().then_some(record.threshold).filter(|t| t.is_finite()),
            alpha: finite(record.alpha).filter(|_| is_sign),
            rows_active: finite(record.rows_active),
            rows_kept: finite(record.rows_kept),
            recall: finite(record.recall),
            missed_energy: finite(record.missed_energy),
            n_tokens: record.n_tokens,
        }
    }

    /// The table for people; shares in percent.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_table(rows: &[Self], out: &mut dyn Write) -> io::Result<()> {
        let percent = |share: Option<f32>| match share {
            Some(share) => format!("{:.2}%", 100.0 * share),
            None => "-".to_owned(),
        };
        writeln!(
            out,
            "predictor      layer    limit   alpha  rows active  rows kept   recall  energy missed  tokens"
        )?;
        for row in rows {
            let limit = row.limit.map(|limit| limit.to_string());
            let limit = limit.or(row.threshold.map(|threshold| format!("{threshold:.3}")));
            let limit = limit.unwrap_or_else(|| "-".to_owned());
            let alpha = row.alpha.map_or_else(|| "-".to_owned(), |alpha| format!("{alpha:.4}"));
            writeln!(
                out,
                "  {:13}  {:3}  {limit:>7}  {alpha:>6}  {:>11}  {:>9}  {:>7}  {:>13}  {:>6}",
                row.kind,
                row.layer,
                percent(row.rows_active),
                percent(row.rows_kept),
                percent(row.recall),
                percent(row.missed_energy),
                row.n_tokens
            )?;
        }
        Ok(())
    }
}

impl TokenizerRow {
    fn new(tokenizer: &Tokenizer) -> Self {
        Self {
            pieces: tokenizer.pieces.len(),
            merges: tokenizer.merges.len(),
            added_tokens: tokenizer.added_tokens.len(),
            dummy_prefix: match tokenizer.dummy_prefix {
                DummyPrefix::Never => "never",
                DummyPrefix::EveryStretch => "every_stretch",
                DummyPrefix::First => "first",
            },
            add_bos: tokenizer.add_bos,
            add_eos: tokenizer.add_eos,
        }
    }
}

impl ProvenanceRow {
    fn new(provenance: Provenance) -> Self {
        let source = |file: format_spec::SourceFile| SourceRow {
            name: file.name,
            bytes: file.len_bytes,
            blake3: hex(&file.blake3),
        };
        Self {
            source_name: provenance.source_name,
            source_files: provenance.source_files.into_iter().map(source).collect(),
            tool: provenance.tool,
            options: provenance.options,
            calibration: provenance.calibration.map(|text| CalibrationRow {
                name: text.name,
                blake3: hex(&text.blake3),
                n_tokens: text.n_tokens,
                window: text.window,
            }),
        }
    }

    fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        let options: Vec<String> =
            self.options.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let (source, tool) = (printable(&self.source_name), printable(&self.tool));
        writeln!(out, "  from {source} by {tool}: {}", printable(&options.join(", ")))?;
        if let Some(text) = &self.calibration {
            writeln!(
                out,
                "  calibrated on {} tokens in windows of {} of {}, blake3 {}",
                text.n_tokens,
                text.window,
                printable(&text.name),
                text.blake3
            )?;
        }
        for file in &self.source_files {
            writeln!(out, "    {}  {:>10}  {}", file.blake3, size(file.bytes), printable(&file.name))?;
        }
        Ok(())
    }
}

/// Text from a file with what would move a terminal's cursor, or turn its text around, written out.
fn printable(text: &str) -> String {
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().flat_map(|c| if acts(c) { c.escape_default().collect() } else { vec![c] }).collect()
}

/// Bytes as lower-case digits, as `b3sum` prints them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A size in the unit that gives it three or four digits.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        10_485_760..10_737_418_240 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_move_the_cursor() {
        assert_eq!(printable("mödel 7B"), "mödel 7B");
        assert_eq!(printable("a\u{1b}[31m\r\nb\u{202e}"), "a\\u{1b}[31m\\r\\nb\\u{202e}");
    }
}
