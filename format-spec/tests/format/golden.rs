//! The checked-in file, and its listing in FORMAT.md, byte for byte.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use format_spec::{DType, FORMAT_VERSION, Layout, Section, SectionKind};
use half::f16;

use crate::patch::{Patch, header, row};
use crate::sample::{Sample, tiny_config};

const BEGIN: &str = "<!-- golden -->\n";
const END: &str = "<!-- /golden -->";

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn golden_path() -> PathBuf {
    folder().join("tests/golden/tiny.sinf")
}

fn sample() -> Sample {
    let mut config = tiny_config();
    config.tie_word_embeddings = true;
    let mut sample = Sample::new(config, DType::F16, 41);
    sample.weights.retain(|(spec, _)| spec.kind != SectionKind::GateLimits);
    sample.predictors[0].kind = format_spec::PredictorKind::Sign;
    sample.curves = None;
    sample
}

/// True when the run is to write the checked-in files again.
pub(crate) fn is_blessing() -> bool {
    std::env::var_os("SINF_BLESS").is_some()
}

/// `SINF_BLESS=1` writes both again; a difference in them then belongs into the commit's text.
#[test]
fn the_golden_file_and_its_listing_are_what_is_written() {
    let text = std::fs::read_to_string(folder().join("FORMAT.md")).expect("FORMAT.md");
    let (before, rest) = text.split_once(BEGIN).expect("the listing's beginning");
    let (listing_found, after) = rest.split_once(END).expect("the listing's end");
    let bytes = sample().bytes();
    let listing = format!("```text\n{}```\n", listing(&bytes));
    if is_blessing() {
        std::fs::write(golden_path(), &bytes).expect("written");
        let text = format!("{before}{BEGIN}{listing}{END}{after}");
        std::fs::write(folder().join("FORMAT.md"), text).expect("written");
        return;
    }
    let golden = std::fs::read(golden_path()).expect("the golden file");
    assert!(golden == bytes, "tests/golden/tiny.sinf is not what is written now");
    assert_eq!(listing_found, listing, "the listing in FORMAT.md is of another file");
    sample().assert_equals(&golden);
}

#[test]
fn the_title_of_the_text_is_the_version() {
    let text = std::fs::read_to_string(folder().join("FORMAT.md")).expect("FORMAT.md");
    let (major, minor) = FORMAT_VERSION;
    let title = format!("# The .sinf format, version {major}.{minor}");
    assert_eq!(text.lines().next(), Some(title.as_str()));
    let golden = std::fs::read(golden_path()).expect("the golden file");
    assert_eq!(Layout::parse(&golden).expect("valid").version(), FORMAT_VERSION);
}

/// Lines of 16 bytes: offset, bytes, and what they are.
fn listing(bytes: &[u8]) -> String {
    let file = Patch { bytes: bytes.to_vec() };
    let layout = Layout::parse(bytes).expect("valid");
    let table = file.get_u64(header::TABLE_OFFSET) as usize;
    let mut listing = String::new();
    let mut was_zero = false;
    for (n, line) in bytes.chunks(16).enumerate() {
        let at = n * 16;
        let note = match at {
            0..256 => header_note(&file, at),
            _ if at >= table => row_note(&file, &layout, table, at),
            _ => section_note(&file, &layout, at),
        };
        let is_zero = note.is_empty() && line.iter().all(|&byte| byte == 0);
        if !is_zero {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(listing, "{at:04x}  {:47}  {note}", hex.join(" ")).expect("to a string");
        } else if !was_zero {
            listing.push_str("*\n");
        }
        was_zero = is_zero;
    }
    listing.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn header_note(file: &Patch, at: usize) -> String {
    let u32 = |at| file.get_u32(at);
    let u64 = |at| file.get_u64(at);
    match at {
        0 => {
            format!("magic, version {}.{}, endianness", file.bytes[header::MAJOR], file.bytes[header::MINOR])
        }
        16 => format!(
            "header_len {}, alignment {}, total_len {}",
            u32(header::HEADER_LEN),
            u32(header::ALIGNMENT),
            u64(header::TOTAL_LEN)
        ),
        32 => format!(
            "table_offset {:#x}, n_sections {}, flags {}",
            u64(header::TABLE_OFFSET),
            u32(header::N_SECTIONS),
            u32(header::FLAGS)
        ),
        48 => format!(
            "hidden_size {}, intermediate_size {}, layers {}, heads {}",
            u32(header::HIDDEN_SIZE),
            u32(header::INTERMEDIATE_SIZE),
            u32(header::NUM_HIDDEN_LAYERS),
            u32(header::NUM_ATTENTION_HEADS)
        ),
        64 => format!(
            "key_value_heads {}, head_dim {}, vocab_size {}, max_position {}",
            u32(header::NUM_KEY_VALUE_HEADS),
            u32(header::HEAD_DIM),
            u32(header::VOCAB_SIZE),
            u32(header::MAX_POSITION_EMBEDDINGS)
        ),
        80 => format!(
            "rope_theta {}, factor {}",
            f64::from_bits(u64(header::ROPE_THETA)),
            f64::from_bits(u64(header::ROPE_SCALING_FACTOR))
        ),
        96 => format!(
            "rope_scaling {}, eps {:e}, activation {}, threshold {}",
            u32(header::ROPE_SCALING),
            f32::from_bits(u32(header::RMS_NORM_EPS)),
            u32(header::ACTIVATION),
            f32::from_bits(u32(header::ACTIVATION_THRESHOLD))
        ),
        112 => format!("bos {}, eos {}, none, none", u32(header::BOS_TOKEN_ID), u32(header::EOS_TOKEN_IDS)),
        128 => "none".to_owned(),
        208 => "8 reserved bytes, digest".to_owned(),
        240 => "header_checksum in the last 8 bytes".to_owned(),
        _ => String::new(),
    }
}

fn section_note(file: &Patch, layout: &Layout, at: usize) -> String {
    let is_inside = |section: &&Section| {
        (section.offset_bytes..section.offset_bytes + section.len_bytes).contains(&(at as u64))
    };
    let Some(section) = layout.sections().iter().find(is_inside) else { return String::new() };
    let from = at - section.offset_bytes as usize;
    let mut note = match from {
        0 => format!("{} {:?} {}", section.kind.name(), section.shape.dims(), section.dtype.name()),
        _ => String::new(),
    };
    let bytes = section.bytes(&file.bytes);
    match (section.kind, from) {
        (SectionKind::GateSigns, 0) => {
            let words = bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
            let words: Vec<String> = words.map(|word| format!("{word:04b}")).collect();
            write!(note, ": {}", words.join(" ")).expect("to a string");
        }
        (SectionKind::WGate, _) => {
            let values = bytes[from..].chunks(2).take(8);
            let values = values.map(|value| f16::from_le_bytes(value.try_into().expect("2 bytes")));
            let values: Vec<String> = values.map(|value| format!("{:.2}", value.to_f32())).collect();
            write!(note, " {}", values.join(" ")).expect("to a string");
        }
        (SectionKind::Predictors, 0) => note += ": kind, limit, alpha, rows_active",
        (SectionKind::Predictors, 16) => note += "rows_kept, recall, missed_energy, n_tokens",
        _ => {}
    }
    note.trim_start().to_owned()
}

fn row_note(file: &Patch, layout: &Layout, table: usize, at: usize) -> String {
    let (index, field) = ((at - table) / row::ROW_LEN, (at - table) % row::ROW_LEN);
    let section = &layout.sections()[index];
    let start = table + index * row::ROW_LEN;
    let u64 = |at| file.get_u64(start + at);
    match field {
        0 => format!(
            "row {index}: {}, layer {}, {}, {}",
            section.kind.name(),
            section.layer.map_or("none".to_owned(), |layer| layer.to_string()),
            section.dtype.name(),
            section.encoding.name()
        ),
        16 => format!(
            "flags {}, n_dims {}, dims {:?}",
            file.get_u32(start + row::FLAGS),
            file.get_u32(start + row::N_DIMS),
            section.shape.dims()
        ),
        48 => format!("offset {:#x}", u64(row::OFFSET)),
        64 => format!("len {}, xxh3 {:016x}", u64(row::LEN), section.xxh3),
        _ => String::new(),
    }
}
