//! What the writer leaves on disk, whatever happens.

use std::fs;
use std::path::Path;

use format_spec::{DType, FormatError, Layout, SectionKind, Writer};

use crate::sample::{Sample, config, spec};

fn sample() -> Sample {
    Sample::new(config(), DType::F16, 13)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("readable");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

#[test]
fn small_and_large_pieces_give_the_same_file() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("pieces.sinf");
    let mut writer = Writer::create(&out, &sample.config, 64, false).expect("created");
    for (n, (spec, bytes)) in sample.weights.iter().enumerate() {
        writer.begin(spec.clone()).expect("begun");
        for piece in bytes.chunks(n + 1) {
            writer.write(piece).expect("written");
        }
    }
    writer.seal(&sample.tail()).expect("sealed");
    writer.commit().expect("committed");
    assert!(fs::read(out).expect("written") == sample.bytes());
}

#[test]
fn a_partial_is_valid_once_sealed_and_can_be_sealed_again() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("twice.sinf");
    let mut writer = sample.begin(&out, false);
    let mut first = sample.clone();
    (first.curves, first.provenance) = (None, None);
    first.predictors[0].limit = 3;
    writer.seal(&first.tail()).expect("sealed");
    first.assert_equals(&fs::read(writer.partial_path()).expect("there"));
    writer.seal(&sample.tail()).expect("sealed again, longer");
    sample.assert_equals(&fs::read(writer.partial_path()).expect("there"));
    writer.seal(&first.tail()).expect("sealed again, shorter");
    first.assert_equals(&fs::read(writer.partial_path()).expect("there"));
    writer.seal(&sample.tail()).expect("and again");
    writer.commit().expect("committed");
    assert_eq!(names(folder.path()), ["twice.sinf"]);
    assert!(fs::read(out).expect("there") == sample.bytes(), "the way there leaves no trace");
}

#[cfg(unix)]
#[test]
fn a_link_in_place_of_the_partial_is_replaced_and_not_followed() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let other = folder.path().join("other");
    fs::write(&other, "precious").expect("written");
    std::os::unix::fs::symlink(&other, folder.path().join("out.sinf.partial")).expect("linked");
    drop(sample.begin(&folder.path().join("out.sinf"), false));
    assert_eq!(names(folder.path()), ["other"]);
    assert_eq!(fs::read(other).expect("there"), b"precious");
}

#[test]
fn sections_may_follow_a_seal() {
    let mut sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("limits.sinf");
    let limits = sample.weights.iter().position(|(spec, _)| spec.kind == SectionKind::GateLimits);
    let limits = sample.weights.remove(limits.expect("the last layer has limits per row"));
    let mut exact = sample.clone();
    for record in &mut exact.predictors {
        record.kind = format_spec::PredictorKind::Off;
    }
    let mut writer = sample.begin(&out, false);
    writer.seal(&exact.tail()).expect("sealed");
    let error = writer.seal(&sample.tail()).expect_err("limits are missing");
    assert!(matches!(error, FormatError::MissingSection { kind: SectionKind::GateLimits, layer: Some(1) }));
    writer.begin(limits.0.clone()).expect("begun after a seal");
    writer.write(&limits.1).expect("written");
    writer.seal(&sample.tail()).expect("sealed");
    writer.commit().expect("committed");
    sample.weights.push(limits);
    sample.assert_equals(&fs::read(out).expect("there"));
}

#[test]
fn dropping_a_writer_leaves_nothing() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("dropped.sinf");
    let mut writer = sample.begin(&out, false);
    writer.seal(&sample.tail()).expect("sealed");
    assert_eq!(names(folder.path()), ["dropped.sinf.partial"]);
    drop(writer);
    assert!(names(folder.path()).is_empty());
    let error = sample.begin(&out, false).commit().expect_err("not sealed");
    assert!(matches!(error, FormatError::WriteOrder { .. }), "{error}");
    assert!(names(folder.path()).is_empty());
}

#[test]
fn a_stale_partial_is_replaced_and_a_living_one_is_not() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("stale.sinf");
    fs::write(folder.path().join("stale.sinf.partial"), vec![1; 1 << 20]).expect("written");
    let mut writer = sample.begin(&out, false);
    let error = Writer::create(&out, &sample.config, 64, true).expect_err("one writer at a time");
    assert!(matches!(error, FormatError::Busy { .. }), "{error}");
    writer.seal(&sample.tail()).expect("sealed");
    writer.commit().expect("committed");
    assert!(fs::read(out).expect("there") == sample.bytes());
    assert_eq!(names(folder.path()), ["stale.sinf"]);
}

#[test]
fn folders_pipes_and_devices_are_left_alone() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let refused = |out: &Path| match Writer::create(out, &sample.config, 64, true) {
        Err(FormatError::Io { path, source, .. }) => format!("{}: {source}", path.display()),
        other => panic!("{other:?}"),
    };
    refused(folder.path());
    refused(&folder.path().join("out.sinf/"));
    if cfg!(unix) {
        let socket = folder.path().join("socket");
        let _open = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
        assert!(refused(&socket).contains("expected a file"));
        // Beside the output as well, where a pipe would be waited for.
        let beside = folder.path().join("out.sinf.partial");
        let _open = std::os::unix::net::UnixListener::bind(&beside).expect("bound");
        assert!(refused(&folder.path().join("out.sinf")).contains("out.sinf.partial"));
        assert_eq!(names(folder.path()), ["out.sinf.partial", "socket"]);
    }
}

#[test]
fn an_existing_file_survives_without_force() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("out.sinf");
    fs::write(&out, "precious").expect("written");
    let error = Writer::create(&out, &sample.config, 64, false).expect_err("it exists");
    assert!(matches!(error, FormatError::Exists { .. }), "{error}");
    assert!(error.to_string().contains("--force"), "{error}");

    // It may also come to exist while the file is written.
    let late = folder.path().join("late.sinf");
    let mut writer = sample.begin(&late, false);
    writer.seal(&sample.tail()).expect("sealed");
    fs::write(&late, "precious").expect("written");
    let error = writer.commit().expect_err("it exists now");
    assert!(matches!(error, FormatError::Exists { .. }), "{error}");
    assert_eq!(names(folder.path()), ["late.sinf", "out.sinf"]);
    for path in [&out, &late] {
        assert_eq!(fs::read(path).expect("there"), b"precious");
    }

    let mut writer = sample.begin(&out, true);
    assert_eq!(fs::read(&out).expect("there"), b"precious", "replaced only at the end");
    writer.seal(&sample.tail()).expect("sealed");
    writer.commit().expect("replaced");
    assert!(fs::read(out).expect("there") == sample.bytes());
}

#[test]
fn unwritable_places_are_named() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("no-such-folder/out.sinf");
    let error = Writer::create(&out, &sample.config, 64, true).expect_err("not writable");
    assert!(matches!(error, FormatError::Io { action: "create", .. }), "{error}");
    assert!(error.to_string().contains("no-such-folder"), "{error}");
    // A folder in the way of the output, from the beginning or later.
    let out = folder.path().join("folder.sinf");
    fs::create_dir(&out).expect("created");
    let error = Writer::create(&out, &sample.config, 64, true).expect_err("a folder is in the way");
    assert!(matches!(error, FormatError::Io { action: "replace", .. }), "{error}");
    let late = folder.path().join("late.sinf");
    let mut writer = sample.begin(&late, true);
    writer.seal(&sample.tail()).expect("sealed");
    fs::create_dir(&late).expect("created");
    let error = writer.commit().expect_err("a folder is in the way");
    assert!(matches!(error, FormatError::Io { action: "rename", .. }), "{error}");
    assert_eq!(names(folder.path()), ["folder.sinf", "late.sinf"]);
}

#[test]
fn misuse_is_an_error() {
    let sample = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("misuse.sinf");
    let mut writer = Writer::create(&out, &sample.config, 64, false).expect("created");
    let embedding = spec(&sample.config, SectionKind::Embedding, None, DType::F16);
    let len_bytes = embedding.shape.len_bytes(DType::F16).expect("small") as usize;
    let is_order = |error: &FormatError| matches!(error, FormatError::WriteOrder { .. });

    assert!(is_order(&writer.write(&[0]).expect_err("nothing is begun")));
    writer.begin(embedding.clone()).expect("begun");
    assert!(is_order(&writer.write(&vec![0; len_bytes + 1]).expect_err("too long")));
    writer.write(&vec![0; len_bytes - 1]).expect("one short");
    assert!(is_order(&writer.begin(embedding.clone()).expect_err("incomplete")));
    assert!(is_order(&writer.seal(&sample.tail()).expect_err("incomplete")));
    writer.write(&[0]).expect("complete");
    let error = writer.begin(embedding.clone()).expect_err("twice");
    assert!(matches!(error, FormatError::Duplicate { first: 0, .. }), "{error}");
    let error = writer.seal(&sample.tail()).expect_err("layers are missing");
    assert!(matches!(error, FormatError::MissingSection { .. }), "{error}");

    let wrong_shape = spec(&sample.config, SectionKind::WGate, Some(0), DType::F16);
    let wrong_shape = format_spec::SectionSpec { kind: SectionKind::WQ, ..wrong_shape };
    assert!(matches!(writer.begin(wrong_shape).expect_err("shape"), FormatError::Shape { .. }));
    let tail = spec(&sample.config, SectionKind::Predictors, None, DType::U8);
    assert!(is_order(&writer.begin(tail).expect_err("seal writes it")));
}

#[test]
fn a_tail_that_breaks_a_rule_is_refused_when_sealed() {
    let good = sample();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let mut writer = good.begin(&folder.path().join("tail.sinf"), false);
    let mut refused = |change: fn(&mut Sample)| {
        let mut sample = good.clone();
        change(&mut sample);
        writer.seal(&sample.tail()).expect_err("a broken rule").to_string()
    };
    let error = refused(|sample| sample.predictors[1].limit = 37);
    assert!(error.contains("limit is 37") && error.contains("36") && error.contains("layer 1"), "{error}");
    let error = refused(|sample| sample.predictors.truncate(1));
    assert!(error.contains("predictors") && error.contains("[2, 64]"), "{error}");
    let error = refused(|sample| sample.tokenizer.merges[1].0 = 300);
    assert!(error.contains("tokenizer") && error.contains("merge 1") && error.contains("300"), "{error}");
    let error = refused(|sample| sample.curves.as_mut().expect("there")[1].truncate(2));
    assert!(error.contains("2 points"), "{error}");
    let error = refused(|sample| sample.curves.as_mut().expect("there")[1][2].recall = 1.5);
    assert!(error.contains("recall is 1.5") && error.contains("layer 1, point 2"), "{error}");
    writer.seal(&good.tail()).expect("and nothing is spoilt");
    Layout::parse(&fs::read(writer.partial_path()).expect("there")).expect("valid");
}
