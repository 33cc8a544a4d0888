//! What is written is read.

use format_spec::{Activation, DType, Layout, RopeScaling, SectionKind};

use crate::sample::{Sample, config};

#[test]
fn every_dtype_reads_back_equal() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let sample = Sample::new(config(), dtype, 1);
        sample.assert_equals(&sample.bytes());
    }
}

#[test]
fn variants_of_the_header_read_back_equal() {
    let mut tied = config();
    tied.tie_word_embeddings = true;
    let mut silu = config();
    silu.activation = Activation::Silu;
    silu.rope.scaling = RopeScaling::None;
    let mut bare = config();
    (bare.bos_token_id, bare.eos_token_ids) = (None, vec![]);
    bare.activation = Activation::Relu;
    let mut wide = config();
    (wide.hidden_size, wide.eos_token_ids) = (64, vec![1, 2, 3, 4]);
    for config in [tied, silu, bare, wide] {
        let sample = Sample::new(config, DType::F16, 2);
        sample.assert_equals(&sample.bytes());
    }
}

#[test]
fn optional_parts_may_be_absent() {
    let mut sample = Sample::new(config(), DType::F16, 3);
    (sample.curves, sample.provenance) = (None, None);
    sample.assert_equals(&sample.bytes());
}

#[test]
fn alignments_are_kept() {
    for alignment_bytes in [64, 128, 4096, 65536] {
        let sample = Sample { alignment_bytes, ..Sample::new(config(), DType::F16, 4) };
        sample.assert_equals(&sample.bytes());
    }
}

#[test]
fn equal_samples_are_equal_bytes() {
    let sample = Sample::new(config(), DType::Bf16, 5);
    assert!(sample.bytes() == sample.bytes());
}

#[test]
fn sections_are_found_by_kind_and_layer_alone() {
    let bytes = Sample::new(config(), DType::F16, 6).bytes();
    let layout = Layout::parse(&bytes).expect("valid");
    assert!(layout.find(SectionKind::WQ, Some(1)).is_some());
    assert!(layout.find(SectionKind::WQ, Some(2)).is_none());
    assert!(layout.find(SectionKind::WQ, None).is_none());
    assert!(layout.find(SectionKind::Embedding, Some(0)).is_none());
    assert!(layout.find(SectionKind::GateLimits, Some(0)).is_none());
    assert!(layout.find(SectionKind::GateLimits, Some(1)).is_some());
}
