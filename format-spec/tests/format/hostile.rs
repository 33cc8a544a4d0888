//! One case per rule: a good file with one field changed, checksummed again so that the rule itself fires.

use format_spec::{Activation, DType, FormatError, Layout, PredictorKind, SectionKind, Shape, Tokenizer};

use crate::patch::{Patch, assert_refused, header, read_all, record, refused, row};
use crate::sample::{Sample, config};

fn good() -> Vec<u8> {
    Sample::new(config(), DType::F16, 21).bytes()
}

/// A change of one 32-bit field.
#[track_caller]
fn refused_u32(at: usize, value: u32) -> FormatError {
    refused(&good(), |file| file.u32(at, value))
}

/// A change of one 32-bit field in a section's row.
#[track_caller]
fn refused_row(kind: SectionKind, layer: Option<u32>, at: usize, value: u32) -> FormatError {
    refused(&good(), |file| file.u32(file.row(kind, layer) + at, value))
}

#[test]
fn the_unchanged_file_is_accepted() {
    let mut patch = Patch { bytes: good() };
    patch.reseal();
    assert!(patch.bytes == good());
    read_all(&patch.bytes).expect("valid");
}

// Identification.

#[test]
fn something_else_is_not_a_sinf_file() {
    for bytes in [&b""[..], b"\x89SIN", b"GGUF\x03\0\0\0", &[0; 4096]] {
        let error = Layout::parse(bytes).expect_err("not a .sinf file");
        assert_refused!(error, FormatError::Magic { .. }, "not a .sinf file");
    }
    let text_mode = refused(&good(), |file| file.bytes[header::MAGIC + 5] = b'\n');
    assert_refused!(text_mode, FormatError::Magic { .. }, "0a, 0a, 1a", "0d, 0a, 1a");
}

#[test]
fn a_file_that_ends_inside_its_header() {
    let error = Layout::parse(&good()[..255]).expect_err("too short");
    assert_refused!(error, FormatError::TooShort { len_bytes: 255 }, "255", "256");
}

#[test]
fn the_other_byte_order() {
    let error = refused_u32(header::ENDIANNESS, 0x0403_0201);
    assert_refused!(error, FormatError::Endianness { .. }, "byte 12", "0x04030201", "0x01020304");
}

#[test]
fn another_major_version() {
    let error = refused(&good(), |file| file.bytes[header::MAJOR] = 2);
    assert_refused!(error, FormatError::Version { found: (2, 2), .. }, "byte 8", "2.2", "1.x");
    let error = refused(&good(), |file| file.bytes[header::MAJOR] = 0);
    assert_refused!(error, FormatError::Version { found: (0, 2), .. }, "0.2");
}

#[test]
fn a_newer_minor_version_is_accepted() {
    let mut file = Patch { bytes: good() };
    file.bytes[header::MINOR] = 9;
    file.reseal();
    assert_eq!(read_all(&file.bytes).expect("valid").version(), (1, 9));
}

#[test]
fn a_header_of_another_length() {
    let error = refused_u32(header::HEADER_LEN, 512);
    assert_refused!(error, FormatError::HeaderLen { found: 512, .. }, "byte 16", "256");
}

#[test]
fn a_header_that_does_not_hash_to_its_checksum() {
    let mut bytes = good();
    bytes[header::HIDDEN_SIZE] ^= 1;
    let error = Layout::parse(&bytes).expect_err("damaged");
    assert_refused!(error, FormatError::HeaderChecksum { .. }, "byte 248", "header checksum");
}

#[test]
fn truncated_and_followed_by_something() {
    let bytes = good();
    let error = Layout::parse(&bytes[..bytes.len() - 1]).expect_err("truncated");
    assert_refused!(error, FormatError::TotalLen { .. }, bytes.len(), bytes.len() - 1, "truncated");
    let error = Layout::parse(&[&bytes[..], &[0]].concat()).expect_err("followed by a byte");
    assert_refused!(error, FormatError::TotalLen { .. }, bytes.len() + 1, "foreign bytes");
}

// Dimensions and constants.

#[test]
fn alignments_that_are_no_power_of_two_or_out_of_range() {
    for value in [0, 1, 32, 96, 65537, 131_072, u32::MAX] {
        let error = refused_u32(header::ALIGNMENT, value);
        assert_refused!(error, FormatError::Alignment { .. }, "byte 20", value, "64 to 65536");
    }
}

#[test]
fn dimensions_of_zero_and_beyond_any_model() {
    for (at, name) in [
        (header::HIDDEN_SIZE, "hidden_size"),
        (header::INTERMEDIATE_SIZE, "intermediate_size"),
        (header::NUM_HIDDEN_LAYERS, "num_hidden_layers"),
        (header::NUM_ATTENTION_HEADS, "num_attention_heads"),
        (header::NUM_KEY_VALUE_HEADS, "num_key_value_heads"),
        (header::HEAD_DIM, "head_dim"),
        (header::VOCAB_SIZE, "vocab_size"),
        (header::MAX_POSITION_EMBEDDINGS, "max_position_embeddings"),
    ] {
        for value in [0, (1 << 24) + 1, u32::MAX] {
            let error = refused_u32(at, value);
            assert_refused!(error, FormatError::Dimension { .. }, format!("byte {at}:"), name, value);
        }
    }
    let error = refused(&good(), |file| {
        file.u32(header::NUM_ATTENTION_HEADS, 1 << 13);
        file.u32(header::HEAD_DIM, 1 << 12);
    });
    assert_refused!(error, FormatError::Dimension { .. }, "num_attention_heads * head_dim", 1 << 25);
}

#[test]
fn heads_that_do_not_share_evenly() {
    let error = refused_u32(header::NUM_KEY_VALUE_HEADS, 4);
    assert_refused!(error, FormatError::Heads { n_q: 6, n_kv: 4, .. }, "byte 64", "is 4", "6");
    assert_refused!(refused_u32(header::NUM_KEY_VALUE_HEADS, 12), FormatError::Heads { .. }, "12");
}

#[test]
fn an_odd_head_dim() {
    let error = refused_u32(header::HEAD_DIM, 5);
    assert_refused!(error, FormatError::HeadDim { found: 5, .. }, "byte 68", "even");
}

#[test]
fn constants_that_are_not_finite_or_out_of_range() {
    let good = good();
    for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = refused(&good, |file| file.f32(header::RMS_NORM_EPS, value));
        assert_refused!(error, FormatError::Constant { .. }, "byte 100: rms_norm_eps", value);
        let error = refused(&good, |file| file.f64(header::ROPE_THETA, f64::from(value)));
        assert_refused!(error, FormatError::Constant { .. }, "byte 80: rope_theta", value);
        let error = refused(&good, |file| file.f64(header::ROPE_SCALING_FACTOR, f64::from(value)));
        assert_refused!(error, FormatError::Constant { .. }, "byte 88: rope_scaling_factor", value);
    }
    for value in [-1.0, f32::NAN, f32::INFINITY] {
        let error = refused(&good, |file| file.f32(header::ACTIVATION_THRESHOLD, value));
        assert_refused!(error, FormatError::Constant { .. }, "byte 108: activation_threshold", value);
    }
}

#[test]
fn unknown_and_reserved_codes_of_the_header() {
    for (code, meaning) in [(4, "relu squared"), (5, "dReLU"), (6, "gelu")] {
        let error = refused_u32(header::ACTIVATION, code);
        let text = "reserved, not supported by this version";
        assert_refused!(error, FormatError::ReservedCode { .. }, "activation", meaning, text);
    }
    for code in [0, 7, u32::MAX] {
        let error = refused_u32(header::ACTIVATION, code);
        assert_refused!(error, FormatError::UnknownCode { .. }, "byte 104: activation", code);
    }
    for (code, meaning) in [(2, "dynamic"), (3, "yarn"), (4, "llama3")] {
        let error = refused_u32(header::ROPE_SCALING, code);
        assert_refused!(error, FormatError::ReservedCode { .. }, "rope_scaling", meaning);
    }
    let error = refused_u32(header::ROPE_SCALING, 5);
    assert_refused!(error, FormatError::UnknownCode { .. }, "byte 96: rope_scaling", 5);
}

#[test]
fn unknown_flags_of_the_header() {
    let error = refused_u32(header::FLAGS, 2);
    assert_refused!(error, FormatError::UnknownFlags { found: 2, .. }, "byte 44: flags", "0x2");
}

#[test]
fn bytes_of_the_header_that_mean_nothing() {
    let error = refused(&good(), |file| file.bytes[header::RESERVED + 3] = 1);
    assert_refused!(error, FormatError::Reserved { .. }, "header at byte 135");
    let error = refused(&good(), |file| file.bytes[header::DIGEST - 1] = 1);
    assert_refused!(error, FormatError::Reserved { .. }, "header at byte 215");
    // Fields that the code beside them leaves without a meaning.
    let error = refused(&good(), |file| file.u32(header::ACTIVATION, 1));
    assert_refused!(error, FormatError::Reserved { .. }, "header at byte 108");
    let error = refused(&good(), |file| file.u32(header::ROPE_SCALING, 0));
    assert_refused!(error, FormatError::Reserved { .. }, "header at byte 94");
}

#[test]
fn special_tokens_outside_the_vocabulary() {
    let error = refused_u32(header::BOS_TOKEN_ID, 300);
    assert_refused!(
        error,
        FormatError::TokenId { .. },
        "byte 112: bos_token_id is 300",
        "below vocab_size 300"
    );
    let error = refused_u32(header::EOS_TOKEN_IDS + 8, 4_000_000_000);
    assert_refused!(error, FormatError::TokenId { .. }, "eos_token_ids is 4000000000");
    let error = refused_u32(header::EOS_TOKEN_IDS, u32::MAX);
    assert_refused!(error, FormatError::EosIds { .. }, "byte 116", "no gap");
}

// Extents.

#[test]
fn tables_that_do_not_end_with_the_file() {
    let good = good();
    let n_sections = Patch { bytes: good.clone() }.get_u32(header::N_SECTIONS);
    for value in [0, 1, n_sections - 1, n_sections + 1, u32::MAX] {
        let error = refused_u32(header::N_SECTIONS, value);
        assert_refused!(error, FormatError::TableBounds { .. }, format!("{value} rows"), good.len());
    }
    for value in [0, good.len() as u64 / 64 * 64, 1 << 40, u64::MAX - 63] {
        let error = refused(&good, |file| file.u64(header::TABLE_OFFSET, value));
        assert_refused!(error, FormatError::TableBounds { .. }, "byte 32", value);
    }
    let error = refused(&good, |file| file.u64(header::TABLE_OFFSET, 65));
    assert_refused!(error, FormatError::Unaligned { .. }, "byte 32: starts at byte 65", "multiple of 64");
}

/// Moves the start of layer 0's w_up, a section in the middle of the file.
#[track_caller]
fn refused_offset(change: impl Fn(u64) -> u64) -> (FormatError, u64) {
    let mut found = 0;
    let error = refused(&good(), |file| {
        let at = file.row(SectionKind::WUp, Some(0)) + row::OFFSET;
        found = change(file.get_u64(at));
        file.u64(at, found);
    });
    (error, found)
}

#[test]
fn extents_that_are_unaligned_unsorted_overlapping_or_apart() {
    let (error, found) = refused_offset(|offset| offset + 32);
    assert_refused!(error, FormatError::Unaligned { .. }, "(w_up, layer 0)", found, "multiple of 64");
    let (error, found) = refused_offset(|offset| offset - 64);
    assert_refused!(error, FormatError::Overlap { .. }, "(w_up, layer 0)", found, found + 64);
    let (error, found) = refused_offset(|offset| offset + 64);
    assert_refused!(error, FormatError::Hole { .. }, "(w_up, layer 0)", found, found - 64);
    for to in [0, 64] {
        let (error, found) = refused_offset(|_| to);
        assert_refused!(
            error,
            FormatError::Unsorted { .. },
            "(w_up, layer 0)",
            format!("is {found}, not above")
        );
    }
    // The first section has none before it, but the header.
    let error = refused(&good(), |file| file.u64(file.row(SectionKind::Embedding, None) + row::OFFSET, 192));
    assert_refused!(error, FormatError::Overlap { .. }, "section 0 (embedding)", 192, 256);
}

#[test]
fn extents_that_reach_into_the_table_or_past_the_end() {
    for change in [u64::MAX, u64::MAX - 255, 1 << 40] {
        let error = refused(&good(), |file| file.u64(file.row(SectionKind::WUp, Some(0)) + row::LEN, change));
        assert_refused!(error, FormatError::SectionBounds { .. }, "(w_up, layer 0)", change);
        let (error, _) = refused_offset(|_| change & !63);
        assert_refused!(error, FormatError::SectionBounds { .. }, "(w_up, layer 0)", change & !63);
    }
    let error = refused(&good(), |file| {
        let at = file.row(SectionKind::Provenance, None) + row::LEN;
        file.u64(at, file.get_u64(at) + 64);
    });
    assert_refused!(error, FormatError::SectionBounds { .. }, "(provenance)");
}

#[test]
fn bytes_before_the_table_that_belong_to_nothing() {
    // Two rows less; the table then starts three alignments later.
    let error = refused(&good(), |file| {
        let at = file.get_u64(header::TABLE_OFFSET);
        let n_sections = file.get_u32(header::N_SECTIONS);
        let end = at as usize + (n_sections - 2) as usize * row::ROW_LEN;
        file.bytes.copy_within(at as usize..end, at as usize + 192);
        file.u64(header::TABLE_OFFSET, at + 192);
        file.u32(header::N_SECTIONS, n_sections - 2);
    });
    assert_refused!(error, FormatError::Hole { .. }, "header at byte 32", "belong to nothing");
}

#[test]
fn padding_that_is_not_zero() {
    let good = good();
    let mut patch = Patch { bytes: good.clone() };
    let layout = Layout::parse(&good).expect("valid");
    let section = layout.find(SectionKind::AttnNorm, Some(0)).expect("there");
    let end = (section.offset_bytes + section.len_bytes) as usize;
    patch.bytes[end + 2] = 7;
    let error = Layout::parse(&patch.bytes).expect_err("padding");
    assert_refused!(error, FormatError::Padding { found: 7, .. }, "(w_q, layer 0)", end + 2, "0x07");
    let table = patch.get_u64(header::TABLE_OFFSET) as usize;
    let error = refused(&good, |file| file.bytes[table - 1] = 1);
    assert_refused!(error, FormatError::Padding { .. }, "before the section table", table - 1);
}

#[test]
fn sections_without_bytes() {
    let error = refused(&good(), |file| file.u64(file.row(SectionKind::WUp, Some(0)) + row::LEN, 0));
    assert_refused!(error, FormatError::Empty { .. }, "(w_up, layer 0)", "len_bytes is 0");
}

// Rows.

#[test]
fn unknown_sections_are_refused_when_required_and_ignored_otherwise() {
    let kind = SectionKind::Provenance;
    let error = refused(&good(), |file| {
        let at = file.row(kind, None);
        file.u32(at + row::KIND, 999);
        file.u32(at + row::FLAGS, 1);
    });
    assert_refused!(error, FormatError::UnknownSection { .. }, "unknown kind 999", "required");

    let mut file = Patch { bytes: good() };
    let at = file.row(kind, None);
    file.u32(at + row::KIND, 999);
    // Whatever the newer version means by them.
    file.u32(at + row::DTYPE, 77);
    file.u32(at + row::ENCODING, 78);
    file.u32(at + row::LAYER, 79);
    file.reseal();
    let layout = read_all(&file.bytes).expect("ignored");
    assert!(layout.find(kind, None).is_none());
    assert_eq!(layout.sections().len() as u32 + 1, file.get_u32(header::N_SECTIONS));
    // Still checksummed.
    let at = file.get_u64(at + row::OFFSET) as usize;
    file.bytes[at] ^= 1;
    let error = layout.verify(&file.bytes, &mut |_| {}).expect_err("damaged");
    assert_refused!(error, FormatError::SectionChecksum { .. }, "unknown kind 999, layer 79");
}

#[test]
fn flags_and_reserved_bytes_of_rows() {
    let error = refused_row(SectionKind::WQ, Some(1), row::FLAGS, 3);
    assert_refused!(error, FormatError::UnknownFlags { .. }, "(w_q, layer 1)", "flags is 0x3");
    let error = refused_row(SectionKind::WQ, Some(1), row::FLAGS, 0);
    assert_refused!(error, FormatError::RequiredFlag { found: false, .. }, "(w_q, layer 1)", "expected true");
    let error = refused_row(SectionKind::Provenance, None, row::FLAGS, 1);
    assert_refused!(error, FormatError::RequiredFlag { found: true, .. }, "(provenance)", "expected false");
    let error = refused_row(SectionKind::WQ, Some(1), row::RESERVED + 12, 1 << 24);
    let at = Patch { bytes: good() }.row(SectionKind::WQ, Some(1)) + 95;
    assert_refused!(error, FormatError::Reserved { .. }, "(w_q, layer 1)", format!("byte {at}"));
}

#[test]
fn layers_that_do_not_fit() {
    let error = refused_row(SectionKind::WQ, Some(1), row::LAYER, 2);
    assert_refused!(error, FormatError::Layer { found: Some(2), .. }, "(w_q, layer 2)", "0 to 1");
    let error = refused_row(SectionKind::WQ, Some(1), row::LAYER, u32::MAX);
    assert_refused!(error, FormatError::Layer { found: None, .. }, "(w_q)", "none", "0 to 1");
    let error = refused_row(SectionKind::FinalNorm, None, row::LAYER, 0);
    assert_refused!(
        error,
        FormatError::Layer { found: Some(0), .. },
        "(final_norm, layer 0)",
        "expected none"
    );
}

#[test]
fn unknown_reserved_and_wrong_types_and_encodings() {
    for (code, meaning) in [(32, "8-bit blocks"), (33, "4-bit blocks")] {
        let error = refused_row(SectionKind::WQ, Some(1), row::DTYPE, code);
        assert_refused!(error, FormatError::ReservedCode { .. }, "(w_q, layer 1)", meaning, "reserved");
    }
    let error = refused_row(SectionKind::WQ, Some(1), row::DTYPE, 0);
    assert_refused!(error, FormatError::UnknownCode { .. }, "(w_q, layer 1)", "dtype is 0");
    let error = refused_row(SectionKind::WQ, Some(1), row::DTYPE, DType::U32.code());
    assert_refused!(error, FormatError::DType { .. }, "dtype is u32", "f32, f16, bf16");
    let error = refused_row(SectionKind::AttnNorm, Some(1), row::DTYPE, DType::F16.code());
    assert_refused!(error, FormatError::DType { .. }, "dtype is f16", "expected f32");
    let error = refused_row(SectionKind::WQ, Some(1), row::ENCODING, 2);
    assert_refused!(error, FormatError::UnknownCode { .. }, "(w_q, layer 1)", "encoding is 2");
    let error = refused_row(SectionKind::WQ, Some(1), row::ENCODING, 1);
    assert_refused!(error, FormatError::Encoding { .. }, "bincode_zstd", "raw");
}

#[test]
fn dimensions_that_are_none() {
    for (n_dims, dims) in
        [(0, [24, 36, 0, 0]), (1, [24, 36, 0, 0]), (5, [1; 4]), (2, [24, 0, 36, 0]), (0, [0; 4])]
    {
        let error = refused(&good(), |file| {
            let at = file.row(SectionKind::WQ, Some(1));
            file.u32(at + row::N_DIMS, n_dims);
            for (n, dim) in dims.into_iter().enumerate() {
                file.u64(at + row::DIMS + 8 * n, dim);
            }
        });
        assert_refused!(
            error,
            FormatError::Dims { .. },
            "(w_q, layer 1)",
            format!("{n_dims} dimensions {dims:?}")
        );
    }
}

#[test]
fn shapes_that_the_model_does_not_imply() {
    let error = refused(&good(), |file| file.u64(file.row(SectionKind::WQ, Some(1)) + row::DIMS, 36));
    assert_refused!(error, FormatError::Shape { .. }, "(w_q, layer 1)", "[36, 36]", "[24, 36]");
    let error = refused(&good(), |file| {
        file.u64(file.row(SectionKind::CalibrationCurves, None) + row::DIMS + 16, 5);
    });
    assert_refused!(error, FormatError::Shape { .. }, "(calibration_curves)", "[2, points, 4]");
    let error = refused(&good(), |file| {
        let at = file.row(SectionKind::Tokenizer, None);
        file.u32(at + row::N_DIMS, 2);
        file.u64(at + row::DIMS + 8, 1);
    });
    assert_refused!(error, FormatError::Shape { .. }, "(tokenizer)", "[bytes]");
    // A header that describes another model.
    let error = refused_u32(header::INTERMEDIATE_SIZE, 11);
    assert_refused!(error, FormatError::Shape { .. }, "gate_signs", "[10, 2]", "[11, 2]");
}

#[test]
fn lengths_that_are_not_those_of_the_elements() {
    let error = refused(&good(), |file| {
        let at = file.row(SectionKind::WQ, Some(1)) + row::LEN;
        file.u64(at, file.get_u64(at) - 1);
    });
    assert_refused!(
        error,
        FormatError::SectionSize { .. },
        "(w_q, layer 1)",
        24 * 36 * 2 - 1,
        24 * 36 * 2,
        "f16"
    );
    let error = refused(&good(), |file| {
        let at = file.row(SectionKind::CalibrationCurves, None);
        file.u64(at + row::DIMS + 8, u64::MAX);
    });
    assert_refused!(error, FormatError::SectionSize { .. }, "(calibration_curves)", u64::MAX);
}

#[test]
fn the_same_section_twice() {
    let error = refused_row(SectionKind::WK, Some(1), row::KIND, SectionKind::WV.code());
    let first = Patch { bytes: good() };
    let first =
        (first.row(SectionKind::WK, Some(1)) - first.get_u64(header::TABLE_OFFSET) as usize) / row::ROW_LEN;
    assert_refused!(error, FormatError::Duplicate { .. }, "(w_v, layer 1)", format!("section {first}"));
}

#[test]
fn sections_that_are_not_there() {
    let good = good();
    let layout = Layout::parse(&good).expect("valid");
    for section in layout.sections().iter().filter(|section| section.required) {
        let error = refused(&good, |file| {
            let at = file.row(section.kind, section.layer);
            file.u32(at + row::KIND, 999);
            file.u32(at + row::FLAGS, 0);
        });
        let name = section.kind.name();
        match section.layer {
            Some(layer) => {
                let text = format!("{name} is missing for layer {layer}");
                assert_refused!(error, FormatError::MissingSection { .. }, text);
            }
            None => assert_refused!(error, FormatError::MissingSection { .. }, format!("{name} is missing")),
        }
    }
    // More layers than the table has rows, told at the first that is missing.
    let error = refused(&good, |file| {
        file.u32(header::NUM_HIDDEN_LAYERS, 1 << 24);
        let at = file.row(SectionKind::Predictors, None);
        file.u64(at + row::DIMS, 1 << 24);
    });
    assert_refused!(error, FormatError::SectionSize { .. }, "(predictors)", (1 << 24) * 64);
}

#[test]
fn an_lm_head_beside_tied_embeddings() {
    let error = refused_u32(header::FLAGS, 1);
    assert_refused!(error, FormatError::UnexpectedSection { .. }, "(lm_head)", "tie_word_embeddings");
}

// Contents.

#[test]
fn bits_past_the_last_column() {
    let error = refused(&good(), |file| {
        let at = file.section(SectionKind::GateSigns, Some(1)) + 3 * 8 + 4;
        file.u32(at, file.get_u32(at) | 1 << 4);
    });
    assert_refused!(
        error,
        FormatError::SignTail { row: 3, .. },
        "(gate_signs, layer 1)",
        "0x00000010",
        "column 36"
    );
}

#[test]
fn limits_larger_than_the_number_of_columns() {
    let error = refused(&good(), |file| file.u32(file.section(SectionKind::GateLimits, Some(1)) + 5 * 4, 37));
    assert_refused!(
        error,
        FormatError::GateLimit { row: 5, found: 37, .. },
        "(gate_limits, layer 1)",
        "at most 36"
    );
}

/// Changes layer 1's predictor record.
#[track_caller]
fn refused_record(at: usize, value: u32) -> FormatError {
    let change = |file: &mut Patch| {
        file.u32(file.section(SectionKind::Predictors, None) + record::RECORD_LEN + at, value);
    };
    refused(&good(), change)
}

#[test]
fn predictor_records_out_of_range() {
    assert_refused!(
        refused_record(record::KIND, 99),
        FormatError::UnknownCode { .. },
        "predictor kind is 99"
    );
    let error = refused_record(record::RESERVED + 4, 1);
    let at = Patch { bytes: good() }.section(SectionKind::Predictors, None) + 64 + 40;
    assert_refused!(error, FormatError::Reserved { .. }, "(predictors)", format!("byte {at}"));
    let error = refused_record(record::LIMIT, 37);
    assert_refused!(error, FormatError::Predictor { .. }, "layer 1", "limit is 37", "hidden_size 36");
    for alpha in [f32::NAN, -0.5, f32::NEG_INFINITY] {
        let error = refused_record(record::ALPHA, alpha.to_bits());
        assert_refused!(error, FormatError::Predictor { .. }, "layer 1", "alpha", alpha);
    }
    for share in [-0.25, 1.25, f32::INFINITY] {
        let error = refused_record(record::RECALL, share.to_bits());
        assert_refused!(error, FormatError::Predictor { .. }, "layer 1", "recall", share);
    }
}

#[test]
fn thresholds_of_other_kinds_and_such_as_are_no_numbers() {
    let error = refused_record(record::THRESHOLD, 1.0_f32.to_bits());
    assert_refused!(error, FormatError::Predictor { .. }, "layer 1", "threshold is 1", "expected 0");
    let error = refused(&scored(PredictorKind::W2), |file| {
        let at = file.section(SectionKind::Predictors, None) + record::RECORD_LEN + record::THRESHOLD;
        file.f32(at, f32::NAN);
    });
    assert_refused!(error, FormatError::Predictor { .. }, "layer 1", "threshold is NaN");
}

/// A good file whose last layer has a predictor of `kind`.
fn scored(kind: PredictorKind) -> Vec<u8> {
    let seed = (0..8).find(|&seed| Sample::new(config(), DType::F16, seed).predictors[1].kind == kind);
    Sample::new(config(), DType::F16, seed.expect("a seed of each kind")).bytes()
}

#[test]
fn planes_and_offsets_that_do_not_fit() {
    let kind_at =
        |file: &Patch| file.section(SectionKind::Predictors, None) + record::RECORD_LEN + record::KIND;
    let bytes = scored(PredictorKind::W2);
    let error = refused(&bytes, |file| file.u32(kind_at(file), 6));
    assert_refused!(error, FormatError::GatePlanes { found: 1, expected: 2, .. }, "layer 1", "w3");
    let error = refused(&bytes, |file| file.u32(kind_at(file), 3));
    assert_refused!(error, FormatError::GatePlanes { found: 1, expected: 0, .. }, "layer 1", "sign_x8");
    let error = refused(&scored(PredictorKind::SignX8), |file| file.u32(kind_at(file), 5));
    assert_refused!(
        error,
        FormatError::MissingSection { kind: SectionKind::GatePlanes, .. },
        "gate_planes",
        "layer 1"
    );
    let error = refused(&bytes, |file| {
        let at = file.section(SectionKind::GatePlanes, Some(1)) + 3 * 8 + 4;
        file.u32(at, file.get_u32(at) | 1 << 4);
    });
    assert_refused!(error, FormatError::SignTail { row: 3, .. }, "(gate_planes, layer 1)", "column 36");
    let error = refused(&bytes, |file| {
        file.f32(file.section(SectionKind::GateOffsets, Some(1)) + 5 * 4, f32::INFINITY);
    });
    assert_refused!(
        error,
        FormatError::GateOffset { row: 5, .. },
        "(gate_offsets, layer 1)",
        "inf",
        "finite"
    );
}

#[test]
fn factors_that_do_not_fit() {
    let kind_at =
        |file: &Patch| file.section(SectionKind::Predictors, None) + record::RECORD_LEN + record::KIND;
    let bytes = scored(PredictorKind::LowRank);
    let error = refused(&bytes, |file| file.u32(kind_at(file), 3));
    assert_refused!(
        error,
        FormatError::GateFactors { section: SectionKind::GateFc1, .. },
        "gate_fc1 of layer 1",
        "sign_x8"
    );
    let error = refused(&scored(PredictorKind::SignX8), |file| file.u32(kind_at(file), 7));
    assert_refused!(
        error,
        FormatError::MissingSection { kind: SectionKind::GateFc1, .. },
        "gate_fc1",
        "layer 1"
    );
    let error = refused(&scored(PredictorKind::LowRank), |file| file.u32(kind_at(file), 8));
    assert_refused!(
        error,
        FormatError::MissingSection { kind: SectionKind::ResidualSigns, .. },
        "residual_signs",
        "layer 1"
    );
    let bytes = scored(PredictorKind::LowRankSign);
    let error = refused(&bytes, |file| file.u32(kind_at(file), 4));
    assert_refused!(
        error,
        FormatError::GateFactors { section: SectionKind::ResidualSigns, .. },
        "residual_signs of layer 1",
        "low_rank"
    );
    let error = refused(&bytes, |file| {
        let at = file.section(SectionKind::ResidualSigns, Some(1)) + 3 * 8 + 4;
        file.u32(at, file.get_u32(at) | 1 << 4);
    });
    assert_refused!(error, FormatError::SignTail { row: 3, .. }, "(residual_signs, layer 1)", "column 36");
    let error = refused(&bytes, |file| {
        file.f32(file.section(SectionKind::ResidualScales, Some(1)) + 5 * 4, f32::NAN);
    });
    assert_refused!(error, FormatError::GateOffset { row: 5, .. }, "(residual_scales, layer 1)", "NaN");
    let mut sample = Sample::new(config(), DType::F16, 4);
    let fc2 = sample.weights.iter_mut().find(|(spec, _)| spec.kind == SectionKind::GateFc2).expect("there");
    fc2.0.shape = Shape::new(&[fc2.0.shape.dims()[0], 2]);
    fc2.1.truncate(fc2.1.len() / 3 * 2);
    let folder = tempfile::tempdir().expect("a scratch folder");
    let mut writer = sample.begin(&folder.path().join("out.sinf"), false);
    let error = writer.seal(&sample.tail()).expect_err("refused");
    assert_refused!(
        error,
        FormatError::GateRank { found: 2, expected: 3, .. },
        "gate_fc2 of layer 1",
        "2 columns"
    );
}

#[test]
fn budgets_out_of_range() {
    let refused_budget = |value: usize, found: f32| {
        let at = (4 + value) * 4;
        refused(&good(), |file| file.f32(file.section(SectionKind::BudgetCurve, None) + at, found))
    };
    for (value, field) in [(0, "kl"), (1, "mlp_bytes"), (2, "limit of layer 0"), (3, "limit of layer 1")] {
        for found in [-1.0, f32::INFINITY] {
            let error = refused_budget(value, found);
            assert_refused!(error, FormatError::Budget { point: 1, .. }, "(budget_curve)", field, found);
        }
    }
    assert_refused!(refused_budget(2, 1.5), FormatError::Budget { .. }, "limit of layer 0 is 1.5");
}

#[test]
fn predictors_of_activations_without_zeros() {
    let mut silu = config();
    silu.activation = Activation::Silu;
    let bytes = Sample::new(silu, DType::F16, 22).bytes();
    let error =
        refused(&bytes, |file| file.u32(file.section(SectionKind::Predictors, None) + record::KIND, 1));
    assert_refused!(error, FormatError::PredictorNotSparse { layer: 0, .. }, "(predictors)", "sign", "silu");
}

#[test]
fn curves_out_of_range() {
    let point = |layer: usize, point: usize, value: usize| (layer * 3 + point) * 16 + value * 4;
    let refused_curve = |at, value: f32| {
        refused(&good(), |file| file.f32(file.section(SectionKind::CalibrationCurves, None) + at, value))
    };
    for limit in [-1.0, 1.5, 18.0, 37.0, f32::NAN] {
        let error = refused_curve(point(1, 2, 0), limit);
        assert_refused!(error, FormatError::Curve { .. }, "layer 1, point 2: limit", limit);
    }
    for (value, name) in [(1, "rows_kept"), (2, "recall"), (3, "missed_energy")] {
        let error = refused_curve(point(0, 1, value), 1.5);
        assert_refused!(error, FormatError::Curve { .. }, "(calibration_curves)", "layer 0, point 1", name);
    }
}

// Compressed records.

/// A file whose tokenizer section holds `bytes` instead.
fn with_tokenizer(bytes: &[u8]) -> Vec<u8> {
    let good = good();
    let layout = Layout::parse(&good).expect("valid");
    let section = layout.find(SectionKind::Tokenizer, None).expect("there");
    let provenance = layout.find(SectionKind::Provenance, None).expect("there");
    let mut file = Patch { bytes: good[..section.offset_bytes as usize].to_vec() };
    let mut rows = good[Patch { bytes: good.clone() }.get_u64(header::TABLE_OFFSET) as usize..].to_vec();
    let pad = |file: &mut Patch| file.bytes.resize(file.bytes.len().next_multiple_of(64), 0);
    let put = |rows: &mut Vec<u8>, from_end: usize, at: usize, value: usize| {
        let at = rows.len() - from_end * row::ROW_LEN + at;
        rows[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
    };
    file.bytes.extend(bytes);
    put(&mut rows, 2, row::LEN, bytes.len());
    put(&mut rows, 2, row::DIMS, bytes.len());
    pad(&mut file);
    put(&mut rows, 1, row::OFFSET, file.bytes.len());
    file.bytes.extend(provenance.bytes(&good));
    pad(&mut file);
    let table = file.bytes.len() as u64;
    file.bytes.extend(rows);
    file.u64(header::TABLE_OFFSET, table);
    file.u64(header::TOTAL_LEN, file.bytes.len() as u64);
    file.reseal();
    file.bytes
}

fn tokenizer_error(bytes: &[u8]) -> FormatError {
    let file = with_tokenizer(bytes);
    Layout::parse(&file).expect("the structure is valid").tokenizer(&file).expect_err("a broken record")
}

fn compressed(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).expect("compressed")
}

#[test]
fn records_that_are_no_single_frame() {
    let good = good();
    let layout = Layout::parse(&good).expect("valid");
    let tokenizer = layout.find(SectionKind::Tokenizer, None).expect("there").bytes(&good);
    let same = with_tokenizer(tokenizer);
    read_all(&same).expect("put back unchanged");
    assert_refused!(tokenizer_error(b"no frame"), FormatError::Zstd { .. }, "(tokenizer)", "zstd");
    let cut = &tokenizer[..tokenizer.len() - 1];
    assert_refused!(tokenizer_error(cut), FormatError::Zstd { .. }, "(tokenizer)", "incomplete");
    let twice = [tokenizer, tokenizer].concat();
    let error = tokenizer_error(&twice);
    assert_refused!(error, FormatError::Zstd { .. }, format!("{} bytes follow the frame", tokenizer.len()));
}

#[test]
fn frames_that_unpack_to_too_much() {
    let bomb = compressed(&vec![0; (64 << 20) + 1]);
    assert!(bomb.len() < 10_000, "a bomb is small");
    let error = tokenizer_error(&bomb);
    assert_refused!(error, FormatError::RecordTooLarge { .. }, "(tokenizer)", 64 << 20);
    // A window that would take 128 MiB to hold.
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).expect("an encoder");
    encoder.window_log(27).expect("accepted");
    encoder.include_contentsize(false).expect("accepted");
    std::io::Write::write_all(&mut encoder, &vec![0; 1 << 20]).expect("written");
    let error = tokenizer_error(&encoder.finish().expect("finished"));
    assert_refused!(error, FormatError::Zstd { .. }, "(tokenizer)", "memory");
}

#[test]
fn values_that_do_not_decode() {
    assert_refused!(tokenizer_error(&compressed(&[])), FormatError::Record { .. }, "(tokenizer)");
    // A count of 2^64 - 1 pieces, and one that the limit stops before it is allocated.
    let count = |n: u64| compressed(&[&[253][..], &n.to_le_bytes()].concat());
    for n in [u64::MAX, 1 << 40, (64 << 20) / 8] {
        assert_refused!(tokenizer_error(&count(n)), FormatError::Record { .. }, "(tokenizer)", "imit");
    }
    let good = good();
    let layout = Layout::parse(&good).expect("valid");
    let tokenizer = layout.find(SectionKind::Tokenizer, None).expect("there").bytes(&good);
    let mut plain = zstd::stream::decode_all(tokenizer).expect("a frame");
    plain.push(0);
    let error = tokenizer_error(&compressed(&plain));
    assert_refused!(error, FormatError::Record { .. }, "(tokenizer)", "1 bytes follow the value");
}

#[test]
fn tokenizers_that_contradict_themselves_or_the_header() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let good = Sample::new(config(), DType::F16, 21);
    let mut writer = good.begin(&folder.path().join("tokenizer.sinf"), false);
    let mut refused_tokenizer = |change: &dyn Fn(&mut Tokenizer)| {
        let mut sample = good.clone();
        change(&mut sample.tokenizer);
        writer.seal(&sample.tail()).expect_err("a broken rule")
    };
    let error = refused_tokenizer(&|tokenizer| tokenizer.pieces.clear());
    assert_refused!(error, FormatError::Tokenizer { .. }, "number of pieces is 0", "vocab_size 300");
    let error = refused_tokenizer(&|tokenizer| tokenizer.pieces.push(tokenizer.pieces[9].clone()));
    assert_refused!(error, FormatError::Tokenizer { .. }, "number of pieces is 301", "vocab_size 300");
    let error = refused_tokenizer(&|tokenizer| tokenizer.merges[1].1 = 300);
    assert_refused!(error, FormatError::Tokenizer { .. }, "merge 1 is 300", "300 pieces");
    let error = refused_tokenizer(&|tokenizer| tokenizer.unk_token_id = Some(301));
    assert_refused!(error, FormatError::Tokenizer { .. }, "unk_token_id is 301");
    let error = refused_tokenizer(&|tokenizer| tokenizer.added_tokens[0].id = 302);
    assert_refused!(error, FormatError::Tokenizer { .. }, "added token 0 is 302", "vocab_size 300");
    for spelling in ["<0x0a>", "<0x1>", "<0x+A>", "0x0A", "<0x0A"] {
        let error = refused_tokenizer(&|tokenizer| tokenizer.pieces[13].text = spelling.to_owned());
        assert_refused!(error, FormatError::Tokenizer { .. }, "byte piece 13", spelling);
    }
    let error = refused_tokenizer(&|tokenizer| {
        tokenizer.pieces.truncate(299);
        tokenizer.unk_token_id = Some(299);
        tokenizer.merges.clear();
    });
    assert_refused!(error, FormatError::Tokenizer { .. }, "unk_token_id is 299", "299 pieces");
    // The reader checks the same: the header loses its BOS.
    let error = refused_u32(header::BOS_TOKEN_ID, u32::MAX);
    assert_refused!(error, FormatError::Tokenizer { .. }, "(tokenizer)", "add_bos is true");
}

// Checksums.

#[test]
fn damage_is_named_by_section() {
    let good = good();
    let layout = Layout::parse(&good).expect("valid");
    let section = layout.find(SectionKind::WDownT, Some(1)).expect("there");
    let mut damaged = good.clone();
    damaged[section.offset_bytes as usize + 5] ^= 16;
    let error = layout.verify(&damaged, &mut |_| {}).expect_err("damaged");
    assert_refused!(error, FormatError::SectionChecksum { .. }, "(w_down_t, layer 1)", "XXH3");
    // The stated checksum itself.
    let mut damaged = Patch { bytes: good.clone() };
    let at = damaged.row(SectionKind::WDownT, Some(1)) + 72;
    damaged.bytes[at] ^= 1;
    let damaged = damaged.bytes;
    let error = Layout::parse(&damaged).expect("valid").verify(&damaged, &mut |_| {}).expect_err("damaged");
    assert_refused!(error, FormatError::SectionChecksum { .. }, "(w_down_t, layer 1)");
    // The stated digest, with a header that is right again.
    let mut damaged = Patch { bytes: good.clone() };
    damaged.bytes[header::DIGEST] ^= 1;
    damaged.reseal();
    let damaged = damaged.bytes;
    let error = Layout::parse(&damaged).expect("valid").verify(&damaged, &mut |_| {}).expect_err("damaged");
    assert_refused!(error, FormatError::Digest { .. }, "BLAKE3");
    // Another file of another length.
    let error = layout.verify(&good[..100], &mut |_| {}).expect_err("another file");
    assert_refused!(error, FormatError::TooShort { .. }, "100");
    let other = Sample::new(config(), DType::F32, 21).bytes();
    let error = layout.verify(&other, &mut |_| {}).expect_err("another file");
    assert_refused!(error, FormatError::Digest { .. }, "BLAKE3");
}

#[test]
fn sign_words_of_other_weights() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let mut sample = Sample::new(config(), dtype, 23);
        let signs = sample.weights.iter_mut().filter(|(spec, _)| spec.kind == SectionKind::GateSigns);
        let (_, bytes) = signs.last().expect("there");
        bytes[4 * 8] ^= 1;
        let bytes = sample.bytes();
        let layout = Layout::parse(&bytes).expect("the structure is valid");
        let error = layout.verify(&bytes, &mut |_| {}).expect_err("other signs");
        assert_refused!(error, FormatError::Signs { row: 4, .. }, "(gate_signs, layer 1)", "row 4");
    }
}
