//! The fuzz target's corpus, replayed and mutated on a stable toolchain.

use std::path::Path;

use format_spec::{DType, fuzzing};

use crate::golden::is_blessing;
use crate::sample::{Sample, Values, tiny_config};

/// File names and bytes. `SINF_BLESS=1` writes the seeds that are made here again.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/read");
    if is_blessing() {
        let mut tied = tiny_config();
        (tied.tie_word_embeddings, tied.hidden_size) = (true, 64);
        for (name, config, dtype) in [("full", tiny_config(), DType::Bf16), ("tied", tied, DType::F32)] {
            std::fs::write(folder.join(name), Sample::new(config, dtype, 51).bytes()).expect("written");
        }
    }
    let entries = std::fs::read_dir(folder).expect("the corpus");
    let paths = entries.map(|entry| entry.expect("readable").path());
    let mut files: Vec<_> = paths
        .map(|path| {
            let name = path.file_name().expect("a file").to_string_lossy().into_owned();
            (name, std::fs::read(path).expect("readable"))
        })
        .collect();
    files.sort();
    assert!(files.len() >= 2, "the corpus has {} files", files.len());
    files
}

#[test]
fn the_corpus_never_panics() {
    for (name, data) in corpus() {
        std::panic::catch_unwind(|| fuzzing::read(&data)).unwrap_or_else(|_| panic!("{name} panics"));
    }
}

/// `SINF_FUZZ_RUNS` asks for more than the few that fit into every test run.
#[test]
fn mutations_of_the_corpus_never_panic() {
    let n_runs =
        std::env::var("SINF_FUZZ_RUNS").map_or(5_000, |runs| runs.parse().expect("a number of runs"));
    let corpus = corpus();
    let mut random = Values(61);
    let mut draw = |below: usize| (random.next_u64() % below.max(1) as u64) as usize;
    for run in 0..n_runs {
        let (_, seed) = &corpus[run % corpus.len()];
        let mut data = seed.clone();
        for _ in 0..=draw(4) {
            mutate(&mut data, &mut draw);
        }
        let data = &data;
        std::panic::catch_unwind(|| fuzzing::read(data)).unwrap_or_else(|_| panic!("run {run} panics"));
    }
}

/// One change: a byte, a bit, a word of a telling value, a copied stretch, or a cut.
fn mutate(data: &mut Vec<u8>, draw: &mut impl FnMut(usize) -> usize) {
    const WORDS: [u64; 10] =
        [0, 1, 64, 255, 1 << 16, 1 << 31, u32::MAX as u64, 1 << 63, u64::MAX - 63, u64::MAX];
    if data.len() < 8 {
        return;
    }
    // Half of the changes go to the table at the end, where most rules are.
    let at = if draw(2) == 0 { draw(data.len()) } else { data.len() - 1 - draw(data.len().min(2200)) };
    match draw(6) {
        0 => data[at] = draw(256) as u8,
        1 => data[at] ^= 1 << draw(8),
        2 => {
            let at = (at & !7).min(data.len() - 8);
            data[at..at + 8].copy_from_slice(&WORDS[draw(WORDS.len())].to_le_bytes());
        }
        3 => {
            let at = (at & !3).min(data.len() - 4);
            data[at..at + 4].copy_from_slice(&(WORDS[draw(WORDS.len())] as u32).to_le_bytes());
        }
        4 => {
            let (from, n_bytes) = (draw(data.len()), draw(100));
            let n_bytes = n_bytes.min(data.len() - from.max(at));
            data.copy_within(from..from + n_bytes, at);
        }
        _ if draw(8) == 0 => data.truncate(at),
        _ => data[at] = data[at].wrapping_add(1),
    }
}
