//! Bodies of the fuzz targets in `fuzz/`, here so that ordinary tests replay their corpus.

use crate::Layout;
use crate::header::repair;

/// Reads everything that `data` holds, as it is and with a header whose length and checksum are right, so that
/// changes behind the header reach the rules they break.
///
/// # Panics
/// If an accepted file's sections do not lie inside it, or two readings differ: bugs that a fuzzer is to find.
pub fn read(data: &[u8]) {
    read_all(data);
    let mut repaired = data.to_vec();
    if repair(&mut repaired).is_some() {
        read_all(&repaired);
    }
}

fn read_all(file: &[u8]) {
    let Ok(layout) = Layout::parse(file) else { return };
    for section in layout.sections() {
        assert_eq!(section.bytes(file).len() as u64, section.len_bytes);
        assert_eq!(layout.find(section.kind, section.layer), Some(section));
    }
    assert_eq!(layout.predictors().len(), layout.config().num_hidden_layers as usize);
    // Refused or not, what counts is that none of these panics.
    let _ = layout.tokenizer(file);
    let _ = layout.provenance(file);
    let _ = layout.calibration_curves(file);
    let mut n_done = 0;
    let _ = layout.verify(file, &mut |n_bytes| {
        assert!((n_done..=file.len() as u64).contains(&n_bytes), "progress goes back or too far");
        n_done = n_bytes;
    });
}
