//! A small file cut and changed at every place: an error, or the same model, and never a panic. `verify` finds every
//! flipped bit.

use format_spec::{DType, Layout};

use crate::patch::{Patch, header, read_all};
use crate::sample::{Sample, tiny_config};

fn small_file() -> Vec<u8> {
    Sample::new(tiny_config(), DType::F16, 31).bytes()
}

#[test]
fn every_length_but_the_right_one_is_an_error() {
    let good = small_file();
    for len_bytes in 0..good.len() {
        assert!(Layout::parse(&good[..len_bytes]).is_err(), "the first {len_bytes} bytes are accepted");
    }
    let mut longer = good;
    for _ in 0..200 {
        longer.push(0);
        assert!(Layout::parse(&longer).is_err(), "{} bytes are accepted", longer.len());
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let good = small_file();
    let layout = Layout::parse(&good).expect("valid");
    let mut file = good.clone();
    for at in 0..good.len() {
        for bit in 0..8 {
            file[at] ^= 1 << bit;
            assert!(layout.verify(&file, &mut |_| {}).is_err(), "bit {bit} of byte {at}, opened before");
            if let Ok(damaged) = read_all(&file) {
                assert_same_model(&damaged, &layout, at);
                assert!(damaged.verify(&file, &mut |_| {}).is_err(), "bit {bit} of byte {at}");
            }
            file[at] ^= 1 << bit;
        }
    }
    assert!(file == good);
}

/// As above with the header's checksum right again, so that every rule behind it is reached, and with whole bytes.
#[test]
fn every_changed_byte_is_an_error_or_harmless() {
    let good = small_file();
    let layout = Layout::parse(&good).expect("valid");
    let mut n_accepted = 0;
    for at in 0..good.len() {
        for change in [|b| b ^ 1, |b| b ^ 0x80, |_| 0, |_| 0xFF, |b: u8| b.wrapping_add(1), |_| 0x7F] {
            let mut file = Patch { bytes: good.clone() };
            file.bytes[at] = change(good[at]);
            file.reseal();
            if file.bytes == good {
                continue;
            }
            let Ok(damaged) = read_all(&file.bytes) else { continue };
            n_accepted += 1;
            assert!(damaged.verify(&file.bytes, &mut |_| {}).is_err(), "byte {at} is {:#x}", file.bytes[at]);
            let is_model = (header::HIDDEN_SIZE..header::RESERVED).contains(&at);
            if !is_model {
                assert_same_model(&damaged, &layout, at);
            }
        }
    }
    assert!(n_accepted > 0, "weights and digests may change without the structure breaking");
}

/// The dimensions are the same, and so are the sections that text cannot be generated without.
#[track_caller]
fn assert_same_model(damaged: &Layout, good: &Layout, at: usize) {
    assert_eq!(damaged.config(), good.config(), "byte {at}");
    for section in good.sections().iter().filter(|section| section.required) {
        let found = damaged.find(section.kind, section.layer);
        let found = found.unwrap_or_else(|| panic!("byte {at}: {} is gone", section.kind.name()));
        let extent =
            |section: &format_spec::Section| (section.offset_bytes, section.len_bytes, section.shape);
        assert_eq!(extent(found), extent(section), "byte {at}");
    }
}
