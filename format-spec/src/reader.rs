//! One pass over header, table and padding that checks every rule before any weight is touched.
//!
//! ```text
//! header      identity, checksum, length, dimensions and constants        header.rs
//! table       extents, kinds, shapes, presence                            table.rs
//! padding     zero between sections
//! predictors  records, and the sections that their kinds ask for          calibration.rs
//! sign words  no bits past the last column (the last word of each row)    signs.rs
//! limits      per row, at most hidden_size; offsets, finite
//! ```
//!
//! The compressed records are checked when they are asked for, checksums by [`Layout::verify`].

use crate::calibration::{parse_budget, parse_curves, parse_records};
use crate::checksum::{FileHasher, SectionHasher};
use crate::header::{DIGESTED_HEADER_LEN, HEADER_LEN, Header};
use crate::table::{Entry, Extent, Table};
use crate::{
    BudgetCurve, CalibrationCurve, FormatError, ModelConfig, PredictorKind, PredictorRecord, Provenance,
    Section, SectionKind, Shape, Tokenizer, metadata, signs,
};

/// Bytes hashed at a time: small enough to stay in a core's cache between the two hashes.
const BLOCK_BYTES: usize = 256 << 10;

/// A validated file's structure; owns no weights. Offsets in it are safe to slice the validated bytes with.
#[derive(Clone, Debug)]
pub struct Layout {
    header: Header,
    table: Table,
    predictors: Vec<PredictorRecord>,
}

impl Layout {
    /// Checks every rule of FORMAT.md over `file`, the whole file's bytes, but checksums and compressed records.
    ///
    /// # Errors
    /// One [`FormatError`] variant per rule.
    pub fn parse(file: &[u8]) -> Result<Self, FormatError> {
        let header = Header::parse(file)?;
        let table = Table::parse(&header, file)?;
        check_padding(&header, &table, file)?;
        let predictors = parse_predictors(&table, file, &header.config)?;
        check_signs(&table, file, &header.config)?;
        check_limits(&table, file, &header.config)?;
        check_offsets(&table, file)?;
        Ok(Self { header, table, predictors })
    }

    /// Dimensions and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.header.config
    }

    /// `(major, minor)` of the file.
    pub fn version(&self) -> (u16, u16) {
        self.header.version
    }

    /// Alignment of the sections.
    pub fn alignment_bytes(&self) -> u32 {
        self.header.alignment_bytes
    }

    /// Known sections in file order.
    pub fn sections(&self) -> &[Section] {
        &self.table.sections
    }

    /// The section of `kind` for `layer` (`None` for whole-model kinds).
    pub fn find(&self, kind: SectionKind, layer: Option<u32>) -> Option<&Section> {
        Some(self.table.find(kind, layer)?.section)
    }

    /// One record per layer.
    pub fn predictors(&self) -> &[PredictorRecord] {
        &self.predictors
    }

    /// BLAKE3 digest of the whole file as the header states it.
    pub fn digest(&self) -> [u8; 32] {
        self.header.digest
    }

    /// The tokenizer, decompressed under a bound and checked against the vocabulary.
    pub fn tokenizer(&self, file: &[u8]) -> Result<Tokenizer, FormatError> {
        let kind = SectionKind::Tokenizer;
        let entry = self.table.find(kind, None).ok_or(FormatError::MissingSection { kind, layer: None })?;
        let tokenizer: Tokenizer = metadata::decode(entry.section.bytes(file), entry.extent.place())?;
        tokenizer.check(self.config(), entry.extent.place())?;
        Ok(tokenizer)
    }

    /// Where the file came from, if it says so.
    pub fn provenance(&self, file: &[u8]) -> Result<Option<Provenance>, FormatError> {
        let entry = self.table.find(SectionKind::Provenance, None);
        entry.map(|entry| metadata::decode(entry.section.bytes(file), entry.extent.place())).transpose()
    }

    /// Calibration curves, one per layer, if the file has them.
    pub fn calibration_curves(&self, file: &[u8]) -> Result<Option<Vec<CalibrationCurve>>, FormatError> {
        let entry = self.table.find(SectionKind::CalibrationCurves, None);
        let parse = |Entry { section, extent }: Entry<'_>| {
            let n_points = section.shape.dims()[1] as usize;
            parse_curves(extent.place(), section.bytes(file), n_points, &self.predictors, self.config())
        };
        entry.map(parse).transpose()
    }

    /// Quality and limits at several budgets, if the file has them.
    pub fn budget_curve(&self, file: &[u8]) -> Result<Option<BudgetCurve>, FormatError> {
        let entry = self.table.find(SectionKind::BudgetCurve, None);
        let parse = |Entry { section, extent }: Entry<'_>| {
            parse_budget(extent.place(), section.bytes(file), &self.predictors, self.config())
        };
        entry.map(parse).transpose()
    }

    /// Recomputes every section checksum and the whole-file digest, and compares the sign words with the weights;
    /// `progress` gets the bytes done so far.
    ///
    /// `file` may have changed since it was validated: every flipped bit is found.
    pub fn verify(&self, file: &[u8], progress: &mut dyn FnMut(u64)) -> Result<(), FormatError> {
        let header = Header::parse(file)?;
        if header != self.header {
            let (found, expected) = (header.digest, self.header.digest);
            return Err(FormatError::Digest { found, expected });
        }
        let mut digest = FileHasher::new();
        let mut end = HEADER_LEN;
        for extent in &self.table.extents {
            let range = range(extent);
            digest.update(&file[end..range.start]);
            end = range.end;
            verify_section(extent, file, &mut digest, progress)?;
        }
        digest.update(&file[end..]);
        let (found, expected) = (digest.finish(&file[..DIGESTED_HEADER_LEN]), self.header.digest);
        if found != expected {
            return Err(FormatError::Digest { found, expected });
        }
        self.verify_signs(file)?;
        progress(file.len() as u64);
        Ok(())
    }

    fn verify_signs(&self, file: &[u8]) -> Result<(), FormatError> {
        let n_cols = self.config().hidden_size;
        for Entry { section, extent } in self.table.of_kind(SectionKind::GateSigns) {
            let Some(weights) = self.find(SectionKind::WGate, section.layer) else { continue };
            let (signs, weights, dtype) = (section.bytes(file), weights.bytes(file), weights.dtype);
            if let Some(row) = signs::first_wrong_row(signs, weights, dtype, n_cols) {
                return Err(FormatError::Signs { place: extent.place(), row });
            }
        }
        Ok(())
    }
}

/// Bytes between header, sections and table are zero.
fn check_padding(header: &Header, table: &Table, file: &[u8]) -> Result<(), FormatError> {
    let mut end = HEADER_LEN as u64;
    let next = table.extents.iter().map(|extent| (extent.offset_bytes, Some(extent)));
    for (offset_bytes, extent) in next.chain([(header.table_offset_bytes, None)]) {
        let padding = &file[end as usize..offset_bytes as usize];
        if let Some(at) = padding.iter().position(|&byte| byte != 0) {
            let before = extent.map_or("the section table".to_owned(), |extent| extent.id.to_string());
            let offset_bytes = end + at as u64;
            return Err(FormatError::Padding { before, offset_bytes, found: padding[at] });
        }
        end = extent.map_or(offset_bytes, Extent::end);
    }
    Ok(())
}

/// Reads the predictor records and checks that the sections they need are there.
fn parse_predictors(
    table: &Table,
    file: &[u8],
    config: &ModelConfig,
) -> Result<Vec<PredictorRecord>, FormatError> {
    let kind = SectionKind::Predictors;
    let entry = table.find(kind, None).ok_or(FormatError::MissingSection { kind, layer: None })?;
    let records = parse_records(entry.extent.place(), entry.section.bytes(file), config)?;
    check_predictor_sections(&records, |kind, layer| Some(table.find(kind, layer)?.section.shape))?;
    Ok(records)
}

/// Sections that predictors ask for are there: `shape(kind, layer)`.
pub(crate) fn check_predictor_sections(
    records: &[PredictorRecord],
    shape: impl Fn(SectionKind, Option<u32>) -> Option<Shape>,
) -> Result<(), FormatError> {
    for (layer, record) in (0..).zip(records) {
        let needed: &[SectionKind] = match record.kind {
            PredictorKind::Off => &[],
            PredictorKind::Sign | PredictorKind::SignX8 => &[SectionKind::GateSigns],
            PredictorKind::SignPerRow => &[SectionKind::GateSigns, SectionKind::GateLimits],
            PredictorKind::W2 | PredictorKind::W3 => &[SectionKind::GateSigns, SectionKind::GatePlanes],
            PredictorKind::LowRank | PredictorKind::LowRankRelu => {
                &[SectionKind::GateFc1, SectionKind::GateFc2]
            }
            PredictorKind::LowRankSign => &[
                SectionKind::GateFc1,
                SectionKind::GateFc2,
                SectionKind::ResidualSigns,
                SectionKind::ResidualScales,
            ],
        };
        let is_missing = |kind: &&SectionKind| shape(**kind, Some(layer)).is_none();
        if let Some(&kind) = needed.iter().find(is_missing) {
            return Err(FormatError::MissingSection { kind, layer: Some(layer) });
        }
        let n_planes = shape(SectionKind::GatePlanes, Some(layer)).map_or(0, |shape| shape.dims()[0]);
        let expected = u64::from(record.kind.n_planes().saturating_sub(1));
        if n_planes != expected {
            let kind = record.kind.name();
            return Err(FormatError::GatePlanes { layer, found: n_planes, expected, kind });
        }
        let factors = [SectionKind::GateFc1, SectionKind::GateFc2];
        let [fc1, fc2] = factors.map(|kind| shape(kind, Some(layer)));
        let residual = [SectionKind::ResidualSigns, SectionKind::ResidualScales];
        let mut read_by_few = factors
            .map(|kind| (kind, record.kind.has_factors()))
            .into_iter()
            .chain(residual.map(|kind| (kind, record.kind.has_residual())));
        let stray = read_by_few.find(|&(kind, is_read)| !is_read && shape(kind, Some(layer)).is_some());
        if let Some((section, _)) = stray {
            return Err(FormatError::GateFactors { layer, section, kind: record.kind.name() });
        }
        if let (Some(fc1), Some(fc2)) = (fc1, fc2) {
            let (found, expected) = (fc2.dims()[1], fc1.dims()[0]);
            if found != expected {
                return Err(FormatError::GateRank { layer, found, expected });
            }
        }
    }
    Ok(())
}

fn check_signs(table: &Table, file: &[u8], config: &ModelConfig) -> Result<(), FormatError> {
    let n_cols = config.hidden_size;
    let kinds = [SectionKind::GateSigns, SectionKind::GatePlanes, SectionKind::ResidualSigns];
    let planes = kinds.into_iter().flat_map(|kind| table.of_kind(kind));
    for Entry { section, extent } in planes {
        if let Some((row, found)) = signs::first_stray_tail(section.bytes(file), n_cols) {
            let row_bytes = signs::n_words(n_cols) as usize * 4;
            let place = extent.place().plus((row as usize + 1) * row_bytes - 4);
            return Err(FormatError::SignTail { place, row, found, n_cols });
        }
    }
    Ok(())
}

fn check_limits(table: &Table, file: &[u8], config: &ModelConfig) -> Result<(), FormatError> {
    let max = config.hidden_size;
    for Entry { section, extent } in table.of_kind(SectionKind::GateLimits) {
        let limits = section.bytes(file).as_chunks::<4>().0.iter().map(|&limit| u32::from_le_bytes(limit));
        if let Some((row, found)) = (0..).zip(limits).find(|&(_, limit)| limit > max) {
            let place = extent.place().plus(row as usize * 4);
            return Err(FormatError::GateLimit { place, row, found, max });
        }
    }
    Ok(())
}

fn check_offsets(table: &Table, file: &[u8]) -> Result<(), FormatError> {
    let kinds = [SectionKind::GateOffsets, SectionKind::ResidualScales];
    for Entry { section, extent } in kinds.into_iter().flat_map(|kind| table.of_kind(kind)) {
        let offsets = section.bytes(file).as_chunks::<4>().0.iter().map(|&offset| f32::from_le_bytes(offset));
        if let Some((row, found)) = (0..).zip(offsets).find(|(_, offset)| !offset.is_finite()) {
            let place = extent.place().plus(row as usize * 4);
            return Err(FormatError::GateOffset { place, row, found });
        }
    }
    Ok(())
}

/// Hashes one section for both checksums, block by block, so that its bytes come from memory once.
fn verify_section(
    extent: &Extent,
    file: &[u8],
    digest: &mut FileHasher,
    progress: &mut dyn FnMut(u64),
) -> Result<(), FormatError> {
    let mut hasher = SectionHasher::new();
    let range = range(extent);
    let mut n_done = range.start;
    for block in file[range].chunks(BLOCK_BYTES) {
        hasher.update(block);
        digest.update(block);
        n_done += block.len();
        progress(n_done as u64);
    }
    let (found, expected) = (hasher.finish(), extent.xxh3);
    if found == expected {
        return Ok(());
    }
    Err(FormatError::SectionChecksum { place: extent.place(), found, expected })
}

fn range(extent: &Extent) -> std::ops::Range<usize> {
    extent.offset_bytes as usize..extent.end() as usize
}
