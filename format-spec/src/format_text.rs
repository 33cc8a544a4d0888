//! Tests that tie the tables of FORMAT.md to the code.

use crate::{Activation, DType, Encoding, PredictorKind, SectionKind, calibration, header, table};

const TEXT: &str = include_str!("../FORMAT.md");

/// Cells of the rows of the table whose first columns are `columns`, up to the next empty line.
fn rows(columns: &str, section: &str) -> Vec<Vec<String>> {
    let (_, from) = TEXT.split_once(section).unwrap_or_else(|| panic!("no {section:?}"));
    let (_, table) = from.split_once(columns).unwrap_or_else(|| panic!("no table {columns:?}"));
    let lines = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let clean = |cell: &str| cell.trim().trim_matches('`').to_owned();
    lines.map(|line| line.trim_matches('|').split('|').map(clean).collect()).collect()
}

#[track_caller]
fn assert_fields(section: &str, fields: &[(&str, usize, usize)]) {
    let rows = rows("| offset | length | type | field | contents |", section);
    let found: Vec<_> = rows
        .iter()
        .map(|row| (row[3].as_str(), row[0].parse().expect("offset"), row[1].parse().expect("length")))
        .collect();
    assert_eq!(found, fields);
}

#[test]
fn fields_lie_where_the_text_says() {
    assert_fields("## 3. Header", &header::fields());
    assert_fields("## 4. Section table", &table::fields());
    assert_fields("## 7. Predictors", &calibration::fields());
}

#[test]
fn kinds_are_those_of_the_text() {
    let yes = |is_so| if is_so { "yes" } else { "no" }.to_owned();
    let row = |kind: SectionKind| {
        let dtypes = match kind.dtypes() {
            [dtype] => dtype.name(),
            _ => "float",
        };
        let encoding = match kind.encoding() {
            Encoding::Raw => "raw",
            Encoding::BincodeZstd => "record",
        };
        let of = if kind.is_per_layer() { "layer" } else { "model" };
        let (code, required) = (kind.code().to_string(), yes(kind.is_required()));
        vec![code, kind.name().to_owned(), of.to_owned(), dtypes.to_owned(), encoding.to_owned(), required]
    };
    let mut found = rows("| kind | name |", "## 5. Section kinds");
    for row in &mut found {
        row.truncate(7);
        row.remove(3);
    }
    assert_eq!(found, SectionKind::ALL.map(row));
}

#[test]
fn dtypes_are_those_of_the_text() {
    let row = |dtype: DType| {
        let bytes = dtype.element_bytes().map_or("-".to_owned(), |n_bytes| n_bytes.to_string());
        vec![dtype.code().to_string(), dtype.name().to_owned(), bytes]
    };
    let mut found = rows("| dtype | name |", "## 4. Section table");
    found.iter_mut().for_each(|row| row.truncate(3));
    assert_eq!(found, DType::ALL.map(row));
}

#[test]
fn codes_are_those_of_the_text() {
    for (code, activation) in
        (1..).zip([Activation::Relu, Activation::FatRelu { threshold: 0.0 }, Activation::Silu])
    {
        let text = format!("{code} {}", activation.name());
        assert!(rows("| offset |", "## 3. Header").iter().any(|row| row[4].contains(&text)), "{text}");
    }
    for kind in PredictorKind::ALL {
        let text = format!("{} {}", kind.code(), kind.name().replace('_', " "));
        assert!(rows("| offset |", "## 7. Predictors").iter().any(|row| row[4].contains(&text)), "{text}");
    }
}
