//! Writes sections in order to `OUT.partial`, then the tail, the table and the header; renames at the end.
//!
//! The weights are streamed once. [`Writer::seal`] then writes everything that may still change (predictors,
//! curves, tokenizer, provenance), so that a converter can seal an exact file, run a calibration over it, and seal
//! again without touching the weights.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::calibration::{RECORD_LEN, encode_curves, encode_records, parse_curves, parse_records};
use crate::checksum::{FileHasher, SectionHasher, xxh3};
use crate::error::{Place, SectionId};
use crate::header::{ALIGNMENTS, HEADER_LEN, Header, check_alignment};
use crate::partial::{Partial, check_output};
use crate::reader::check_predictor_sections;
use crate::table::{align_up, check_presence, check_section, encode_table};
use crate::{
    CalibrationCurve, DType, Encoding, FORMAT_VERSION, FormatError, ModelConfig, PredictorRecord, Provenance,
    Section, SectionKind, Shape, Tokenizer, metadata,
};

/// As many as padding ever takes.
static ZEROS: [u8; *ALIGNMENTS.end() as usize] = [0; *ALIGNMENTS.end() as usize];

/// What a section will hold, known before its bytes.
#[derive(Clone, Debug)]
pub struct SectionSpec {
    /// What it holds.
    pub kind: SectionKind,
    /// Layer, for the per-layer kinds.
    pub layer: Option<u32>,
    /// Element type.
    pub dtype: DType,
    /// Dimensions in elements.
    pub shape: Shape,
    /// How its bytes are to be read.
    pub encoding: Encoding,
    /// A reader that does not know the kind must refuse the file.
    pub required: bool,
}

/// Everything after the weights.
#[derive(Clone, Debug)]
pub struct Tail<'a> {
    /// One record per layer.
    pub predictors: &'a [PredictorRecord],
    /// One curve per layer, or none.
    pub curves: Option<&'a [CalibrationCurve]>,
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Where the file came from.
    pub provenance: Option<&'a Provenance>,
}

/// Streams one file. Dropped before [`Writer::commit`], it removes `OUT.partial`.
///
/// After [`FormatError::Io`] from [`Writer::write`] the section's bytes are lost and the writer is of no more use.
#[derive(Debug)]
pub struct Writer {
    out: PathBuf,
    force: bool,
    config: ModelConfig,
    alignment_bytes: u32,
    partial: Partial,
    /// Complete weight sections.
    weights: Vec<Section>,
    open: Option<OpenSection>,
    /// Where the weights end so far, and the digest's state there.
    end_bytes: u64,
    digest: FileHasher,
    /// True when bytes of a tail may follow the weights.
    has_tail: bool,
    /// Length of the file while it is sealed.
    sealed_len_bytes: Option<u64>,
}

/// The section begun last, until its bytes are complete.
#[derive(Debug)]
struct OpenSection {
    section: Section,
    n_missing: u64,
    hasher: SectionHasher,
}

impl Writer {
    /// Creates `OUT.partial` beside `out`. `alignment_bytes`: a power of two, 64 to 65536 (4096 for shipped files).
    ///
    /// What a killed run left under that name is replaced.
    ///
    /// # Errors
    /// `out` exists and `force` is false; the folder cannot be written; another process is writing the same file;
    /// `config` or `alignment_bytes` breaks a rule.
    pub fn create(
        out: &Path,
        config: &ModelConfig,
        alignment_bytes: u32,
        force: bool,
    ) -> Result<Self, FormatError> {
        config.check()?;
        check_alignment(alignment_bytes)?;
        check_output(out, force)?;
        let mut partial = Partial::create(out)?;
        // The header's place; what lies before the first section is padding from then on.
        partial.write(&[0; HEADER_LEN])?;
        Ok(Self {
            out: out.to_owned(),
            force,
            config: config.clone(),
            alignment_bytes,
            partial,
            weights: Vec::new(),
            open: None,
            end_bytes: HEADER_LEN as u64,
            digest: FileHasher::new(),
            has_tail: false,
            sealed_len_bytes: None,
        })
    }

    /// Path of the unfinished file.
    pub fn partial_path(&self) -> PathBuf {
        self.partial.path().to_owned()
    }

    /// Starts the next weight section; the one before must be complete. After [`Writer::seal`], the tail is dropped
    /// and has to be sealed again.
    ///
    /// # Errors
    /// `spec` contradicts the model's dimensions, the kind's rules or an earlier section.
    pub fn begin(&mut self, spec: SectionSpec) -> Result<(), FormatError> {
        self.expect_complete("begin")?;
        let section = self.next_section(spec)?;
        self.drop_tail()?;
        let padding = padding(self.end_bytes, section.offset_bytes);
        self.digest.update(padding);
        self.partial.write(padding)?;
        self.end_bytes = section.offset_bytes;
        let n_missing = section.len_bytes;
        self.open = Some(OpenSection { section, n_missing, hasher: SectionHasher::new() });
        Ok(())
    }

    /// Appends bytes to the section begun last.
    ///
    /// # Errors
    /// No section is open; more bytes than its shape has; the disk is full.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let Some(open) = &mut self.open else {
            let found = "no open section".to_owned();
            return Err(write_order("write", found, "begin first, then the bytes of the shape"));
        };
        let len_bytes = bytes.len() as u64;
        let Some(n_missing) = open.n_missing.checked_sub(len_bytes) else {
            let found = format!("{len_bytes} bytes for {}", describe(&open.section));
            return Err(write_order("write", found, format!("at most {} more", open.n_missing)));
        };
        open.hasher.update(bytes);
        self.digest.update(bytes);
        self.partial.write(bytes)?;
        self.end_bytes += len_bytes;
        open.n_missing = n_missing;
        if n_missing == 0
            && let Some(OpenSection { mut section, hasher, .. }) = self.open.take()
        {
            section.xxh3 = hasher.finish();
            self.weights.push(section);
        }
        Ok(())
    }

    /// Writes (or writes again) the tail, table and header, and flushes: `OUT.partial` is then a valid file.
    ///
    /// # Errors
    /// A section is missing or incomplete; a record of the tail breaks a rule; the disk is full.
    pub fn seal(&mut self, tail: &Tail<'_>) -> Result<(), FormatError> {
        self.expect_complete("seal")?;
        let encoded = self.encode_tail(tail)?;
        self.check_presence(tail)?;
        self.drop_tail()?;
        self.has_tail = true;
        let mut output = TailOutput {
            partial: &mut self.partial,
            digest: self.digest.clone(),
            end_bytes: self.end_bytes,
            alignment_bytes: self.alignment_bytes,
        };
        let mut sections = self.weights.clone();
        for (mut section, bytes) in encoded {
            section.offset_bytes = output.write_aligned(&bytes)?;
            sections.push(section);
        }
        let table = encode_table(&sections);
        let table_offset_bytes = output.write_aligned(&table)?;
        let TailOutput { digest, end_bytes: total_len_bytes, .. } = output;
        let header = Header {
            version: FORMAT_VERSION,
            alignment_bytes: self.alignment_bytes,
            total_len_bytes,
            table_offset_bytes,
            n_sections: sections.len() as u32,
            config: self.config.clone(),
            digest: [0; 32],
        };
        self.partial.write_start(&header.encode(|digested| digest.finish(digested)))?;
        self.sealed_len_bytes = Some(total_len_bytes);
        Ok(())
    }

    /// Syncs the sealed file and renames it to `out`. Returns its length in bytes.
    ///
    /// # Errors
    /// The file is not sealed; `out` has come to exist and `force` is false; the disk is full. The unfinished file
    /// is then removed.
    pub fn commit(self) -> Result<u64, FormatError> {
        let Some(len_bytes) = self.sealed_len_bytes else {
            return Err(write_order("commit", "an unfinished file".to_owned(), "seal first"));
        };
        self.partial.commit(&self.out, self.force)?;
        Ok(len_bytes)
    }

    /// Removes what an earlier [`Writer::seal`] wrote after the weights, complete or not.
    fn drop_tail(&mut self) -> Result<(), FormatError> {
        self.sealed_len_bytes = None;
        if self.has_tail {
            self.partial.truncate(self.end_bytes)?;
            self.has_tail = false;
        }
        Ok(())
    }

    fn expect_complete(&self, what: &'static str) -> Result<(), FormatError> {
        match &self.open {
            Some(OpenSection { section, n_missing, .. }) => {
                let found = format!("{} lacks {n_missing} bytes", describe(section));
                Err(write_order(what, found, "complete sections"))
            }
            None => Ok(()),
        }
    }

    /// The section that `spec` describes, checked and placed after what is there.
    fn next_section(&self, spec: SectionSpec) -> Result<Section, FormatError> {
        let SectionSpec { kind, layer, dtype, shape, encoding, required } = spec;
        let place = self.place(self.weights.len(), kind, layer);
        if kind.is_tail() {
            return Err(write_order(
                "begin",
                kind.name().to_owned(),
                "a weight section; seal writes the tail",
            ));
        }
        let section =
            Section { kind, layer, dtype, shape, encoding, required, offset_bytes: 0, len_bytes: 0, xxh3: 0 };
        check_section(&section, &self.config, |_| place)?;
        if let Some(first) = self.weights.iter().position(|w| (w.kind, w.layer) == (kind, layer)) {
            return Err(FormatError::Duplicate { place, first: first as u32 });
        }
        let offset_bytes = align_up(self.end_bytes, self.alignment_bytes);
        match (offset_bytes, shape.len_bytes(dtype)) {
            (Some(offset_bytes), Some(len_bytes)) => Ok(Section { offset_bytes, len_bytes, ..section }),
            _ => Err(write_order("begin", describe(&section), "a file of less than 2^64 bytes")),
        }
    }

    /// The tail's sections with their bytes, checked as a reader will check them; offsets are not known yet.
    fn encode_tail(&self, tail: &Tail<'_>) -> Result<Vec<(Section, Vec<u8>)>, FormatError> {
        let mut encoded = vec![self.encode_predictors(tail.predictors)?];
        if let Some(curves) = tail.curves {
            encoded.push(self.encode_curves(curves, encoded.len())?);
        }
        let place = self.tail_place(SectionKind::Tokenizer, encoded.len());
        tail.tokenizer.check(&self.config, place)?;
        encoded.push(self.encode_metadata(SectionKind::Tokenizer, tail.tokenizer, place)?);
        if let Some(provenance) = tail.provenance {
            let place = self.tail_place(SectionKind::Provenance, encoded.len());
            encoded.push(self.encode_metadata(SectionKind::Provenance, provenance, place)?);
        }
        Ok(encoded)
    }

    fn encode_predictors(&self, records: &[PredictorRecord]) -> Result<(Section, Vec<u8>), FormatError> {
        let kind = SectionKind::Predictors;
        let place = self.tail_place(kind, 0);
        let bytes = encode_records(records);
        let section = self.tail_section(kind, &[records.len() as u64, RECORD_LEN as u64], &bytes, place)?;
        parse_records(place, &bytes, &self.config)?;
        Ok((section, bytes))
    }

    fn encode_curves(
        &self,
        curves: &[CalibrationCurve],
        n_before: usize,
    ) -> Result<(Section, Vec<u8>), FormatError> {
        let kind = SectionKind::CalibrationCurves;
        let place = self.tail_place(kind, n_before);
        let n_points = curves.first().map_or(0, Vec::len);
        if let Some(odd) = curves.iter().find(|curve| curve.len() != n_points || n_points == 0) {
            let found = format!("a curve of {} points", odd.len());
            return Err(write_order(kind.name(), found, "as many in every layer, at least one"));
        }
        let bytes = encode_curves(curves);
        let section = self.tail_section(kind, &[curves.len() as u64, n_points as u64, 4], &bytes, place)?;
        parse_curves(place, &bytes, n_points, &self.config)?;
        Ok((section, bytes))
    }

    fn encode_metadata(
        &self,
        kind: SectionKind,
        record: &impl metadata::Record,
        place: Place,
    ) -> Result<(Section, Vec<u8>), FormatError> {
        let bytes = metadata::encode(record, place)?;
        Ok((self.tail_section(kind, &[bytes.len() as u64], &bytes, place)?, bytes))
    }

    /// A section of the tail, not placed in the file yet.
    fn tail_section(
        &self,
        kind: SectionKind,
        dims: &[u64],
        bytes: &[u8],
        place: Place,
    ) -> Result<Section, FormatError> {
        let section = Section {
            kind,
            layer: None,
            dtype: kind.dtypes()[0],
            shape: Shape::new(dims),
            encoding: kind.encoding(),
            required: kind.is_required(),
            offset_bytes: 0,
            len_bytes: bytes.len() as u64,
            xxh3: xxh3(bytes),
        };
        check_section(&section, &self.config, |_| place)?;
        Ok(section)
    }

    fn check_presence(&self, tail: &Tail<'_>) -> Result<(), FormatError> {
        let keys: HashSet<_> = self.weights.iter().map(|section| (section.kind, section.layer)).collect();
        let is_there = |kind: SectionKind, layer| kind.is_tail() || keys.contains(&(kind, layer));
        check_presence(&self.config, is_there)?;
        check_predictor_sections(tail.predictors, is_there)
    }

    /// A section for messages; its offset means nothing to the caller, so it is left out.
    fn place(&self, index: usize, kind: SectionKind, layer: Option<u32>) -> Place {
        let section = SectionId { index: index as u32, kind: kind.code(), layer };
        Place { section: Some(section), offset_bytes: None }
    }

    /// The section of the tail that `n_before` others of it precede.
    fn tail_place(&self, kind: SectionKind, n_before: usize) -> Place {
        self.place(self.weights.len() + n_before, kind, None)
    }
}

/// Where [`Writer::seal`] stands.
struct TailOutput<'a> {
    partial: &'a mut Partial,
    digest: FileHasher,
    end_bytes: u64,
    alignment_bytes: u32,
}

impl TailOutput<'_> {
    /// Writes padding and `bytes`; returns where the latter start.
    fn write_aligned(&mut self, bytes: &[u8]) -> Result<u64, FormatError> {
        let Some(offset_bytes) = align_up(self.end_bytes, self.alignment_bytes) else {
            return Err(write_order("seal", "a full file".to_owned(), "a file of less than 2^64 bytes"));
        };
        for piece in [padding(self.end_bytes, offset_bytes), bytes] {
            self.digest.update(piece);
            self.partial.write(piece)?;
        }
        self.end_bytes = offset_bytes + bytes.len() as u64;
        Ok(offset_bytes)
    }
}

/// Zero bytes from one offset to the next aligned one.
fn padding(from: u64, to: u64) -> &'static [u8] {
    &ZEROS[..(to - from) as usize]
}

fn describe(section: &Section) -> String {
    match section.layer {
        Some(layer) => format!("{} of layer {layer}", section.kind.name()),
        None => section.kind.name().to_owned(),
    }
}

fn write_order(what: &'static str, found: String, expected: impl Into<String>) -> FormatError {
    FormatError::WriteOrder { what, found, expected: expected.into() }
}
