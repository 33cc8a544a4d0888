//! `prep report`: one page about a file.

use std::path::Path;

use integration_tests::{bundled_sinf, expect_code, expect_error, expect_success, prep, workspace};

fn report(file: &Path, out: &Path, arguments: &[&str]) -> std::process::Command {
    let mut command = prep();
    command.arg("report").arg(file).arg("-o").arg(out).args(arguments);
    command
}

/// Rows of the table under `caption`.
fn table_rows(page: &str, caption: &str) -> usize {
    let table = page.split(&format!("<caption>{caption}</caption>")).nth(1);
    let table = table.unwrap_or_else(|| panic!("no table {caption}: {page}"));
    table.split("</table>").next().expect("closed").matches("<tr><th scope=\"row\">").count()
}

#[test]
fn a_page_shows_what_the_file_holds() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("page.html");
    expect_success(&mut report(bundled_sinf(), &out, &[]));
    let page = std::fs::read_to_string(&out).expect("UTF-8");
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    for foreign in ["http", "src=", "href", "<script", "url(", "@import"] {
        assert!(!page.contains(foreign), "the page has {foreign}");
    }
    assert_eq!(page.matches("role=\"img\" aria-label=").count(), 5);
    for words in ["prefers-color-scheme: dark", "<h1>relu-llama-8m</h1>", "built-in", "chosen"] {
        assert!(page.contains(words), "{words}");
    }
    assert_eq!(table_rows(&page, "predictors, by layer"), 8);
    assert_eq!(table_rows(&page, "bytes a token, by part"), 9);
    assert!(table_rows(&page, "the curve in the file") > 2);
    assert!(!page.contains(": not measured"), "everything is known of a calibrated file");

    expect_success(&mut report(bundled_sinf(), &folder.path().join("again.html"), &[]));
    let again = std::fs::read_to_string(folder.path().join("again.html")).expect("UTF-8");
    assert!(again == page, "the same file gives the same page");
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 2, "OUT.partial is gone");
}

#[test]
fn a_text_adds_every_predictor() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let (out, text) = (folder.path().join("page.html"), workspace().join("README.md"));
    let text = text.to_str().expect("UTF-8");
    let arguments = ["--text", text, "--tokens", "200", "--calibration-tokens", "300", "--quiet"];
    expect_success(&mut report(bundled_sinf(), &out, &arguments));
    let page = std::fs::read_to_string(&out).expect("UTF-8");
    assert_eq!(page.matches("role=\"img\" aria-label=").count(), 6);
    // Dense, exact, stored; seven kinds for eight budgets; seven alphas.
    assert_eq!(table_rows(&page, "every predictor on your text"), 3 + 7 * 8 + 7);
    assert!(!page.contains(text), "no paths of this machine");
}

#[test]
fn an_output_is_replaced_when_asked_for_and_never_half_written() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("page.html");
    std::fs::write(&out, "mine").expect("written");
    let error = expect_error(&mut report(bundled_sinf(), &out, &[]), 1);
    assert!(error.contains("page.html") && error.contains("--force"), "{error}");
    let error = expect_error(&mut report(&out, &folder.path().join("of-a-page.html"), &[]), 1);
    assert!(error.contains("page.html") && error.contains("not a .sinf file"), "{error}");
    let missing = folder.path().join("missing.txt");
    let arguments = ["--force", "--text", missing.to_str().expect("UTF-8")];
    let error = expect_error(&mut report(bundled_sinf(), &out, &arguments), 1);
    assert!(error.contains("missing.txt"), "{error}");
    assert_eq!(std::fs::read_to_string(&out).expect("there"), "mine");
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 1, "nothing is left behind");

    expect_success(&mut report(bundled_sinf(), &out, &["--force"]));
    assert!(std::fs::read_to_string(&out).expect("there").contains("<h1>"));

    let copy = folder.path().join("model.sinf");
    std::fs::copy(bundled_sinf(), &copy).expect("copied");
    let error = expect_error(&mut report(&copy, &copy, &["--force"]), 1);
    assert!(error.contains("model.sinf") && error.contains("another output"), "{error}");
    expect_code(prep().arg("verify").arg(&copy), 0);
    expect_code(&mut report(bundled_sinf(), &out, &["--tokens", "5"]), 2);
    expect_code(prep().arg("report").arg(bundled_sinf()), 2);
}
