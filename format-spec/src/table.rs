//! The section table: rows to and from bytes, and the rules that they obey among themselves and with the header.

use crate::error::{Place, SectionId};
use crate::field::Field;
use crate::header::{HEADER_LEN, Header, NONE, table_place};
use crate::{DType, Encoding, FormatError, ModelConfig, Section, SectionKind, Shape, signs};

/// Length of a row.
pub(crate) const ROW_LEN: usize = 96;

const REQUIRED: u32 = 1;

const KIND: Field<4> = Field::first("kind");
const LAYER: Field<4> = KIND.then("layer");
const DTYPE: Field<4> = LAYER.then("dtype");
const ENCODING: Field<4> = DTYPE.then("encoding");
const FLAGS: Field<4> = ENCODING.then("flags");
const N_DIMS: Field<4> = FLAGS.then("n_dims");
const DIMS: Field<32> = N_DIMS.then("dims");
const OFFSET_BYTES: Field<8> = DIMS.then("offset_bytes");
const LEN_BYTES: Field<8> = OFFSET_BYTES.then("len_bytes");
const XXH3: Field<8> = LEN_BYTES.then("xxh3");
const RESERVED: Field<16> = XXH3.then("reserved");
const _: () = assert!(RESERVED.end() == ROW_LEN);

/// Where any section lies, known to this version or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) id: SectionId,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u64,
    pub(crate) xxh3: u64,
}

impl Extent {
    /// First byte after the section.
    pub(crate) fn end(&self) -> u64 {
        self.offset_bytes + self.len_bytes
    }

    /// The section's first byte, for messages about its contents.
    pub(crate) fn place(&self) -> Place {
        Place { section: Some(self.id), offset_bytes: Some(self.offset_bytes) }
    }
}

/// A known section and its place in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) section: &'a Section,
    pub(crate) extent: &'a Extent,
}

/// The checked table.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// Known sections in file order.
    pub(crate) sections: Vec<Section>,
    /// All sections in file order.
    pub(crate) extents: Vec<Extent>,
    /// Ascending, so that sections are found by kind and layer.
    keys: Vec<Key>,
}

impl Table {
    /// Reads and checks the table of `file`, whose header is `header`. Allocates in proportion to the rows that the
    /// file really holds.
    pub(crate) fn parse(header: &Header, file: &[u8]) -> Result<Self, FormatError> {
        let rows = rows(header, file)?;
        let mut table = Self { sections: Vec::new(), extents: Vec::new(), keys: Vec::new() };
        let mut previous_offset = None;
        let mut end = HEADER_LEN as u64;
        for (row, index) in rows.iter().zip(0..) {
            let row = Row { header, index, bytes: row };
            let extent = row.extent(previous_offset, end)?;
            (previous_offset, end) = (Some(extent.offset_bytes), extent.end());
            if let Some(section) = row.section(&extent)? {
                let (kind, layer) = (section.kind, section.layer);
                let (section_idx, extent_idx) = (table.sections.len(), table.extents.len());
                table.keys.push(Key { kind, layer, section_idx, extent_idx });
                table.sections.push(section);
            }
            table.extents.push(extent);
        }
        // Aligned and not before the last section's end, as checked; so what differs are bytes in between.
        let (found, expected) = (header.table_offset_bytes, align_up(end, header.alignment_bytes));
        if expected.is_none_or(|expected| found != expected) {
            let expected = expected.unwrap_or(u64::MAX);
            return Err(FormatError::Hole { place: table_place(), found, expected });
        }
        table.keys.sort_unstable();
        table.check_duplicates()?;
        check_presence(&header.config, |kind, layer| table.find(kind, layer).is_some())?;
        Ok(table)
    }

    /// The section of `kind` for `layer`.
    pub(crate) fn find(&self, kind: SectionKind, layer: Option<u32>) -> Option<Entry<'_>> {
        let at = self.keys.binary_search_by_key(&(kind, layer), Key::name).ok()?;
        Some(self.entry(&self.keys[at]))
    }

    /// The sections of `kind`, layers ascending.
    pub(crate) fn of_kind(&self, kind: SectionKind) -> impl Iterator<Item = Entry<'_>> {
        let from = self.keys.partition_point(|key| key.kind < kind);
        self.keys[from..].iter().take_while(move |key| key.kind == kind).map(|key| self.entry(key))
    }

    fn entry(&self, key: &Key) -> Entry<'_> {
        Entry { section: &self.sections[key.section_idx], extent: &self.extents[key.extent_idx] }
    }

    fn check_duplicates(&self) -> Result<(), FormatError> {
        match self.keys.windows(2).find(|pair| pair[0].name() == pair[1].name()) {
            Some(pair) => {
                let [first, second] = [&pair[0], &pair[1]].map(|key| self.entry(key).extent);
                Err(FormatError::Duplicate { place: second.place(), first: first.id.index })
            }
            None => Ok(()),
        }
    }
}

/// Finds a section by its name, which is its kind and its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    kind: SectionKind,
    layer: Option<u32>,
    section_idx: usize,
    extent_idx: usize,
}

impl Key {
    fn name(&self) -> (SectionKind, Option<u32>) {
        (self.kind, self.layer)
    }
}

/// Every section that the model needs is there: `is_there(kind, layer)`. What depends on the
/// predictors is checked with them.
pub(crate) fn check_presence(
    config: &ModelConfig,
    is_there: impl Fn(SectionKind, Option<u32>) -> bool,
) -> Result<(), FormatError> {
    let is_needed = |kind: &SectionKind| match kind {
        SectionKind::LmHead => !config.tie_word_embeddings,
        SectionKind::GateSigns
        | SectionKind::GateLimits
        | SectionKind::GatePlanes
        | SectionKind::GateOffsets
        | SectionKind::GateFc1
        | SectionKind::GateFc2
        | SectionKind::ResidualSigns
        | SectionKind::ResidualScales => false,
        kind => kind.is_required(),
    };
    let (per_layer, whole): (Vec<_>, Vec<_>) =
        SectionKind::ALL.into_iter().filter(is_needed).partition(|kind| kind.is_per_layer());
    let whole = whole.into_iter().map(|kind| (kind, None));
    // Ends at the first layer that lacks a section, so after no more layers than there are sections.
    let layers = (0..config.num_hidden_layers)
        .flat_map(|layer| per_layer.iter().map(move |&kind| (kind, Some(layer))));
    match whole.chain(layers).find(|&(kind, layer)| !is_there(kind, layer)) {
        Some((kind, layer)) => Err(FormatError::MissingSection { kind, layer }),
        None => Ok(()),
    }
}

/// The rules on a section that follow from its kind and the model.
///
/// `place` turns a field into the place that messages name.
pub(crate) fn check_section(
    section: &Section,
    config: &ModelConfig,
    place: impl Fn(Field<4>) -> Place,
) -> Result<(), FormatError> {
    let kind = section.kind;
    let n_layers = config.num_hidden_layers;
    let layer_fits = match section.layer {
        Some(layer) => kind.is_per_layer() && layer < n_layers,
        None => !kind.is_per_layer(),
    };
    if !layer_fits {
        let expected = if kind.is_per_layer() { format!("0 to {}", n_layers - 1) } else { "none".to_owned() };
        return Err(FormatError::Layer { place: place(LAYER), found: section.layer, expected });
    }
    if kind == SectionKind::LmHead && config.tie_word_embeddings {
        let reason = "tie_word_embeddings makes the embedding the output projection";
        return Err(FormatError::UnexpectedSection { place: place(KIND), reason });
    }
    if !kind.dtypes().contains(&section.dtype) {
        let names: Vec<_> = kind.dtypes().iter().map(|dtype| dtype.name()).collect();
        let (found, expected) = (section.dtype.name(), names.join(", "));
        return Err(FormatError::DType { place: place(DTYPE), found, expected });
    }
    if section.encoding != kind.encoding() {
        let (found, expected) = (section.encoding.name(), kind.encoding().name());
        return Err(FormatError::Encoding { place: place(ENCODING), found, expected });
    }
    if section.required != kind.is_required() {
        return Err(FormatError::RequiredFlag { place: place(FLAGS), found: section.required });
    }
    check_shape(section, config, || place(N_DIMS))
}

fn check_shape(
    section: &Section,
    config: &ModelConfig,
    place: impl Fn() -> Place,
) -> Result<(), FormatError> {
    let dims = section.shape.dims();
    let refuse =
        |expected: String| Err(FormatError::Shape { place: place(), found: dims.to_vec(), expected });
    match section.kind.expected_shape(config) {
        Some(expected) if section.shape != expected => refuse(format!("{:?}", expected.dims())),
        Some(_) => Ok(()),
        None if section.kind == SectionKind::CalibrationCurves => {
            let n_layers = u64::from(config.num_hidden_layers);
            let fits = dims.len() == 3 && dims[0] == n_layers && dims[2] == 4;
            if fits { Ok(()) } else { refuse(format!("[{n_layers}, points, 4]")) }
        }
        None if section.kind == SectionKind::BudgetCurve => {
            let width = 2 + u64::from(config.num_hidden_layers);
            let fits = dims.len() == 2 && dims[1] == width;
            if fits { Ok(()) } else { refuse(format!("[points, {width}]")) }
        }
        None if section.kind == SectionKind::GatePlanes => {
            let (n_rows, n_words) = (config.intermediate_size, signs::n_words(config.hidden_size));
            let (n_rows, n_words) = (u64::from(n_rows), u64::from(n_words));
            let fits = dims.len() == 3 && (1..=2).contains(&dims[0]) && dims[1..] == [n_rows, n_words];
            if fits { Ok(()) } else { refuse(format!("[1 or 2, {n_rows}, {n_words}]")) }
        }
        None if section.kind == SectionKind::GateFc1 => {
            let n_cols = u64::from(config.hidden_size);
            let fits = dims.len() == 2 && dims[0] <= n_cols && dims[1] == n_cols;
            if fits { Ok(()) } else { refuse(format!("[rank up to {n_cols}, {n_cols}]")) }
        }
        None if section.kind == SectionKind::GateFc2 => {
            let (n_rows, n_cols) = (u64::from(config.intermediate_size), u64::from(config.hidden_size));
            let fits = dims.len() == 2 && dims[0] == n_rows && dims[1] <= n_cols;
            if fits { Ok(()) } else { refuse(format!("[{n_rows}, rank up to {n_cols}]")) }
        }
        None if dims.len() != 1 => refuse("[bytes]".to_owned()),
        None => Ok(()),
    }
}

/// Name, offset and length of every field, for the test that compares them with FORMAT.md.
#[cfg(test)]
pub(crate) fn fields() -> Vec<(&'static str, usize, usize)> {
    vec![
        KIND.info(),
        LAYER.info(),
        DTYPE.info(),
        ENCODING.info(),
        FLAGS.info(),
        N_DIMS.info(),
        DIMS.info(),
        OFFSET_BYTES.info(),
        LEN_BYTES.info(),
        XXH3.info(),
        RESERVED.info(),
    ]
}

/// The table's bytes.
pub(crate) fn encode_table<'a>(sections: impl IntoIterator<Item = &'a Section>) -> Vec<u8> {
    sections.into_iter().flat_map(encode_row).collect()
}

fn encode_row(section: &Section) -> [u8; ROW_LEN] {
    let mut row = [0; ROW_LEN];
    let block = &mut row[..];
    KIND.put(block, section.kind.code().to_le_bytes());
    LAYER.put(block, section.layer.unwrap_or(NONE).to_le_bytes());
    DTYPE.put(block, section.dtype.code().to_le_bytes());
    ENCODING.put(block, section.encoding.code().to_le_bytes());
    FLAGS.put(block, if section.required { REQUIRED } else { 0 }.to_le_bytes());
    N_DIMS.put(block, (section.shape.dims().len() as u32).to_le_bytes());
    let mut dims = [0; 32];
    for (bytes, dim) in dims.as_chunks_mut::<8>().0.iter_mut().zip(section.shape.stored()) {
        *bytes = dim.to_le_bytes();
    }
    DIMS.put(block, dims);
    OFFSET_BYTES.put(block, section.offset_bytes.to_le_bytes());
    LEN_BYTES.put(block, section.len_bytes.to_le_bytes());
    XXH3.put(block, section.xxh3.to_le_bytes());
    row
}

/// `offset_bytes` rounded up to a multiple of `alignment_bytes`; `None` beyond 2^64 - 1.
pub(crate) fn align_up(offset_bytes: u64, alignment_bytes: u32) -> Option<u64> {
    offset_bytes.checked_next_multiple_of(u64::from(alignment_bytes))
}

/// The rows of the table, which ends where the file ends.
fn rows<'a>(header: &Header, file: &'a [u8]) -> Result<&'a [[u8; ROW_LEN]], FormatError> {
    let (offset_bytes, alignment_bytes) = (header.table_offset_bytes, header.alignment_bytes);
    if !offset_bytes.is_multiple_of(u64::from(alignment_bytes)) {
        let (place, found) = (table_place(), offset_bytes);
        return Err(FormatError::Unaligned { place, found, alignment_bytes });
    }
    let bytes = usize::try_from(offset_bytes).ok().and_then(|offset| file.get(offset..)).unwrap_or_default();
    let (rows, rest) = bytes.as_chunks::<ROW_LEN>();
    if rows.len() as u64 == u64::from(header.n_sections) && rest.is_empty() && !rows.is_empty() {
        return Ok(rows);
    }
    Err(FormatError::TableBounds {
        place: table_place(),
        n_sections: header.n_sections,
        offset_bytes,
        total_len_bytes: header.total_len_bytes,
    })
}

/// One row while it is read.
struct Row<'a> {
    header: &'a Header,
    index: u32,
    bytes: &'a [u8; ROW_LEN],
}

impl Row<'_> {
    /// Where the section lies: sorted, aligned, right after what lies before, and in front of the table.
    fn extent(&self, previous_offset: Option<u64>, end: u64) -> Result<Extent, FormatError> {
        let alignment_bytes = self.header.alignment_bytes;
        let found = OFFSET_BYTES.u64(self.bytes);
        let len_bytes = LEN_BYTES.u64(self.bytes);
        let place = self.place(OFFSET_BYTES);
        if !found.is_multiple_of(u64::from(alignment_bytes)) {
            return Err(FormatError::Unaligned { place, found, alignment_bytes });
        }
        if let Some(previous) = previous_offset
            && found <= previous
        {
            return Err(FormatError::Unsorted { place, found, previous });
        }
        let table_offset_bytes = self.header.table_offset_bytes;
        if found.checked_add(len_bytes).is_none_or(|end| end > table_offset_bytes) {
            let offset_bytes = found;
            return Err(FormatError::SectionBounds { place, offset_bytes, len_bytes, table_offset_bytes });
        }
        let expected = align_up(end, alignment_bytes).unwrap_or(u64::MAX);
        if found < expected {
            return Err(FormatError::Overlap { place, found, expected });
        }
        if found > expected {
            return Err(FormatError::Hole { place, found, expected });
        }
        if len_bytes == 0 {
            return Err(FormatError::Empty { place: self.place(LEN_BYTES) });
        }
        Ok(Extent { id: self.id(), offset_bytes: found, len_bytes, xxh3: XXH3.u64(self.bytes) })
    }

    /// What the section holds; `None` when this version does not know it and need not.
    fn section(&self, extent: &Extent) -> Result<Option<Section>, FormatError> {
        let flags = FLAGS.u32(self.bytes);
        if flags & !REQUIRED != 0 {
            let place = self.place(FLAGS);
            return Err(FormatError::UnknownFlags {
                place,
                field: FLAGS.name,
                found: flags,
                known: REQUIRED,
            });
        }
        let required = flags & REQUIRED != 0;
        if let Some(offset_bytes) = RESERVED.first_nonzero(self.bytes, self.offset_bytes()) {
            let place = Place { section: Some(extent.id), offset_bytes: Some(offset_bytes) };
            return Err(FormatError::Reserved { place });
        }
        let shape = self.shape()?;
        let Some(kind) = SectionKind::from_code(KIND.u32(self.bytes)) else {
            return if required {
                Err(FormatError::UnknownSection { place: self.place(KIND) })
            } else {
                Ok(None)
            };
        };
        let section = Section {
            kind,
            layer: self.layer(),
            dtype: self.dtype()?,
            shape,
            encoding: self.encoding()?,
            required,
            offset_bytes: extent.offset_bytes,
            len_bytes: extent.len_bytes,
            xxh3: extent.xxh3,
        };
        check_section(&section, &self.header.config, |field| self.place(field))?;
        let expected = section.shape.len_bytes(section.dtype);
        if expected != Some(section.len_bytes) {
            return Err(FormatError::SectionSize {
                place: self.place(LEN_BYTES),
                found: section.len_bytes,
                expected: expected.unwrap_or(u64::MAX),
                dtype: section.dtype.name(),
                dims: section.shape.dims().to_vec(),
            });
        }
        Ok(Some(section))
    }

    fn shape(&self) -> Result<Shape, FormatError> {
        let n_dims = N_DIMS.u32(self.bytes);
        let bytes = DIMS.get(self.bytes);
        let mut dims = [0; 4];
        for (dim, &bytes) in dims.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *dim = u64::from_le_bytes(bytes);
        }
        let n_used = dims.iter().position(|&dim| dim == 0).unwrap_or(dims.len());
        if n_used == 0 || n_used as u64 != u64::from(n_dims) || dims[n_used..].iter().any(|&dim| dim != 0) {
            return Err(FormatError::Dims { place: self.place(N_DIMS), n_dims, dims });
        }
        Ok(Shape::new(&dims[..n_used]))
    }

    fn dtype(&self) -> Result<DType, FormatError> {
        let (place, field, found) = (self.place(DTYPE), DTYPE.name, DTYPE.u32(self.bytes));
        match DType::from_code(found) {
            Some(DType::Q8Block) => {
                Err(FormatError::ReservedCode { place, field, found, meaning: "8-bit blocks" })
            }
            Some(DType::Q4Block) => {
                Err(FormatError::ReservedCode { place, field, found, meaning: "4-bit blocks" })
            }
            Some(dtype) => Ok(dtype),
            None => Err(FormatError::UnknownCode { place, field, found }),
        }
    }

    fn encoding(&self) -> Result<Encoding, FormatError> {
        let (place, field, found) = (self.place(ENCODING), ENCODING.name, ENCODING.u32(self.bytes));
        Encoding::from_code(found).ok_or(FormatError::UnknownCode { place, field, found })
    }

    fn layer(&self) -> Option<u32> {
        let layer = LAYER.u32(self.bytes);
        (layer != NONE).then_some(layer)
    }

    fn id(&self) -> SectionId {
        SectionId { index: self.index, kind: KIND.u32(self.bytes), layer: self.layer() }
    }

    /// Start of the row in the file.
    fn offset_bytes(&self) -> u64 {
        self.header.table_offset_bytes + u64::from(self.index) * ROW_LEN as u64
    }

    fn place<const N: usize>(&self, field: Field<N>) -> Place {
        let offset_bytes = self.offset_bytes() + field.offset as u64;
        Place { section: Some(self.id()), offset_bytes: Some(offset_bytes) }
    }
}
