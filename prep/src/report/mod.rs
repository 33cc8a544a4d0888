//! `prep report`: one page about a file, for a browser.
//!
//! The page is complete in itself: style and charts are in it, scripts and links to elsewhere are not. It shows what the
//! file holds, and, with a text to measure on, what `prep eval` finds. The same file and text give the same page but for
//! the speeds measured: no times, no paths.

mod charts;
mod html;

use std::path::{Path, PathBuf};

use format_spec::partial::{Partial, check_output};
use format_spec::{BudgetPoint, PredictorKind, PredictorRecord, SectionKind};
use runtime::Model;

use self::charts::{Bar, Role, Share, Svg, TradeOff};
use self::html::Html;
use crate::eval::{EvalOptions, EvalRow, Evaluation, eval};
use crate::inspect::{Inspection, size};
use crate::output::check_is_no_input;
use crate::{PrepError, Progress};

/// What to write, and where.
#[derive(Clone, Debug)]
pub struct ReportOptions {
    /// The page.
    pub out: PathBuf,
    /// Replace an existing page.
    pub force: bool,
    /// What to measure; `None` shows what the file holds.
    pub eval: Option<EvalOptions>,
}

/// Writes a page about the file in `path`. Returns its length in bytes.
///
/// # Errors
/// A file that is not valid, an output that exists or cannot be written, those of [`eval`]. No page is then left behind.
pub fn report(path: &Path, options: &ReportOptions, progress: &Progress) -> Result<u64, PrepError> {
    let text = options.eval.as_ref().map(|eval| eval.text.as_path());
    check_is_no_input(&options.out, std::iter::once(path).chain(text))?;
    let facts = Facts::read(path)?;
    // Before the measurement, which may take minutes.
    check_output(&options.out, options.force)?;
    let mut partial = Partial::create(&options.out)?;
    let evaluation = options.eval.as_ref().map(|options| eval(path, options, progress)).transpose()?;
    let page = page(&facts, evaluation.as_ref());
    partial.write(page.as_bytes())?;
    partial.commit(&options.out, options.force)?;
    Ok(page.len() as u64)
}

/// What the file holds.
struct Facts {
    inspection: Inspection,
    /// Name of the file, without its folder.
    file_name: String,
    records: Vec<PredictorRecord>,
    budget: Vec<BudgetPoint>,
    bytes: Bytes,
    /// The file has sign words, so that predictors can be measured on it.
    has_signs: bool,
}

/// Bytes of the sections that a token may read.
#[derive(Default)]
struct Bytes {
    embedding_row: u64,
    attention: u64,
    norms: u64,
    lm_head: u64,
    layers: Vec<LayerBytes>,
}

/// A part of what a token reads, in bytes.
#[derive(Clone, Copy)]
struct Part {
    name: &'static str,
    /// Of a dense token.
    dense: f64,
    /// With rows left out; none where these were not measured.
    own: Option<f64>,
}

/// The MLP of a layer.
#[derive(Clone, Copy, Default)]
struct LayerBytes {
    predictor: u64,
    gate: u64,
    up: u64,
    down: u64,
}

/// Rows of a layer, as shares; none where they were not measured.
#[derive(Clone, Copy)]
struct Rows {
    active: Option<f64>,
    kept: Option<f64>,
    recall: Option<f64>,
    missed_energy: Option<f64>,
}

impl Facts {
    fn read(path: &Path) -> Result<Self, PrepError> {
        let model = Model::open(path)?;
        let budget = model.layout().budget_curve(model.bytes()).map_err(|error| model.error(error))?;
        Ok(Self {
            inspection: Inspection::of(&model, false)?,
            file_name: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
            records: model.layout().predictors().to_vec(),
            budget: budget.unwrap_or_default(),
            bytes: Bytes::of(&model),
            has_signs: model.gate_planes(0).is_some(),
        })
    }

    /// The point of the stored curve that the records are.
    fn chosen(&self) -> Option<&BudgetPoint> {
        self.budget.iter().find(|point| {
            self.records.iter().zip(&point.limits).all(|(record, &limit)| match record.kind {
                PredictorKind::Off => true,
                kind if kind.has_score() => record.threshold == limit,
                _ => record.limit as f32 == limit,
            })
        })
    }

    /// Rows by layer: as stored, or else as measured. Silu leaves none at zero.
    fn rows(&self, evaluation: Option<&Evaluation>) -> Vec<Rows> {
        if self.inspection.config.hidden_act == "silu" {
            let all =
                Rows { active: Some(1.0), kept: Some(1.0), recall: Some(1.0), missed_energy: Some(0.0) };
            return vec![all; self.records.len()];
        }
        let measured = evaluation.and_then(|found| found.rows.iter().find(|row| row.predictor == "stored"));
        let of_layer = |(layer, record): (usize, &PredictorRecord)| {
            let measured = measured.and_then(|row| row.quality.layers.get(layer));
            let or = |stored: f32, measured: Option<f64>| {
                Some(f64::from(stored)).filter(|share| !share.is_nan()).or(measured)
            };
            Rows {
                active: or(record.rows_active, measured.map(|layer| layer.rows_active)),
                kept: or(record.rows_kept, measured.map(|layer| layer.rows_kept)),
                recall: or(record.recall, measured.map(|layer| layer.recall)),
                missed_energy: or(record.missed_energy, measured.map(|layer| layer.missed_energy)),
            }
        };
        self.records.iter().enumerate().map(of_layer).collect()
    }
}

impl Bytes {
    fn of(model: &Model) -> Self {
        let layout = model.layout();
        let config = layout.config();
        let mut bytes =
            Self { layers: vec![LayerBytes::default(); layout.predictors().len()], ..Self::default() };
        for section in layout.sections() {
            let len = section.len_bytes;
            let layer = section.layer.map_or(0, |layer| layer as usize);
            match section.kind {
                SectionKind::Embedding => {
                    bytes.embedding_row = len / u64::from(config.vocab_size);
                    if config.tie_word_embeddings {
                        bytes.lm_head = len;
                    }
                }
                SectionKind::LmHead => bytes.lm_head = len,
                SectionKind::FinalNorm | SectionKind::AttnNorm | SectionKind::MlpNorm => bytes.norms += len,
                SectionKind::WQ | SectionKind::WK | SectionKind::WV | SectionKind::WO => {
                    bytes.attention += len
                }
                SectionKind::GateSigns
                | SectionKind::GateLimits
                | SectionKind::GatePlanes
                | SectionKind::GateOffsets
                | SectionKind::GateFc1
                | SectionKind::GateFc2
                | SectionKind::ResidualSigns
                | SectionKind::ResidualScales => {
                    // A layer without prediction has them for nothing.
                    if layout.predictors()[layer].kind != PredictorKind::Off {
                        bytes.layers[layer].predictor += len;
                    }
                }
                SectionKind::WGate => bytes.layers[layer].gate = len,
                SectionKind::WUp => bytes.layers[layer].up = len,
                SectionKind::WDownT => bytes.layers[layer].down = len,
                SectionKind::Predictors
                | SectionKind::CalibrationCurves
                | SectionKind::BudgetCurve
                | SectionKind::Tokenizer
                | SectionKind::Provenance => {}
            }
        }
        bytes
    }

    /// The three matrices of all layers.
    fn dense_mlp(&self) -> f64 {
        self.layers.iter().map(|layer| (layer.gate + layer.up + layer.down) as f64).sum()
    }

    /// Parts of a token's reads.
    fn parts(&self, records: &[PredictorRecord], rows: &[Rows]) -> Vec<Part> {
        let dense = |of: fn(&LayerBytes) -> u64| self.layers.iter().map(of).sum::<u64>() as f64;
        let own = |of: &dyn Fn(&LayerBytes, &PredictorRecord, &Rows) -> Option<f64>| {
            let layers = self.layers.iter().zip(records).zip(rows);
            layers.map(|((layer, record), rows)| of(layer, record, rows)).sum::<Option<f64>>()
        };
        let kept = |record: &PredictorRecord, rows: &Rows| match record.kind {
            PredictorKind::Off => Some(1.0),
            _ => rows.kept,
        };
        // Up and down rows are read where the gate, once computed, is not zero.
        let both = |record: &PredictorRecord, rows: &Rows| match record.kind {
            PredictorKind::Off => rows.active,
            _ => rows.active.zip(rows.recall).map(|(active, recall)| active * recall),
        };
        let part = |name, dense, own| Part { name, dense, own };
        let fixed = |name, bytes: u64| part(name, bytes as f64, Some(bytes as f64));
        let gate = own(&|layer, record, rows| Some(layer.gate as f64 * kept(record, rows)?));
        let up = own(&|layer, record, rows| Some(layer.up as f64 * both(record, rows)?));
        let down = own(&|layer, record, rows| Some(layer.down as f64 * both(record, rows)?));
        vec![
            fixed("attention", self.attention),
            part("predictor", 0.0, Some(dense(|layer| layer.predictor))),
            part("gate", dense(|layer| layer.gate), gate),
            part("up", dense(|layer| layer.up), up),
            part("down", dense(|layer| layer.down), down),
            fixed("lm_head", self.lm_head),
            fixed("norms", self.norms),
            fixed("embedding, one row", self.embedding_row),
        ]
    }
}

/// Where bytes are shown, all in one unit: its size and name.
#[derive(Clone, Copy)]
struct Unit(f64, &'static str);

impl Unit {
    /// For a chart whose largest value is `bytes`.
    fn of(bytes: f64) -> Self {
        match bytes {
            bytes if bytes >= 1e9 => Self(1e9, "GB"),
            bytes if bytes >= 1e6 => Self(1e6, "MB"),
            _ => Self(1e3, "kB"),
        }
    }

    fn in_it(self, bytes: f64) -> f64 {
        bytes / self.0
    }

    fn show(self, bytes: f64) -> String {
        format!("{} {}", charts::trimmed(self.in_it(bytes)), self.1)
    }
}

fn percent(share: f64) -> String {
    format!("{} %", charts::trimmed(100.0 * share))
}

fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "not measured".to_owned(), show)
}

fn page(facts: &Facts, evaluation: Option<&Evaluation>) -> String {
    let rows = facts.rows(evaluation);
    let source = facts.inspection.provenance.as_ref().map(|provenance| &provenance.source_name);
    let title = source.unwrap_or(&facts.file_name);
    let mut html = Html::default();
    html.raw("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    html.raw("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    html.nest("title", |html| {
        html.text(title);
        html.raw(" - what a token reads");
    });
    html.raw("\n<style>\n");
    html.raw(include_str!("style.css"));
    html.raw("</style>\n</head>\n<body>\n<main>\n");
    html.element("h1", title);
    let config = &facts.inspection.config;
    html.nest("p", |html| {
        html.element("code", &facts.file_name);
        html.text(&format!(
            ": .sinf {}, {}; {} layers, hidden_size {}, intermediate_size {}, {}",
            facts.inspection.format_version,
            size(facts.inspection.bytes),
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act
        ));
    });
    let parts = facts.bytes.parts(&facts.records, &rows);
    summary(&mut html, facts, &parts, &rows);
    bytes_by_part(&mut html, &parts);
    by_layer(&mut html, facts, &rows);
    trade_off(&mut html, facts, evaluation);
    provenance(&mut html, facts);
    html.raw("</main>\n</body>\n</html>\n");
    html.finish()
}

fn summary(html: &mut Html, facts: &Facts, parts: &[Part], rows: &[Rows]) {
    let total = |of: fn(&Part) -> Option<f64>, only_mlp: bool| {
        let is_mlp = |name: &str| ["predictor", "gate", "up", "down"].contains(&name);
        parts.iter().filter(|part| !only_mlp || is_mlp(part.name)).map(of).sum::<Option<f64>>()
    };
    let mean = |of: fn(&Rows) -> Option<f64>| {
        rows.iter().map(of).sum::<Option<f64>>().map(|sum| sum / rows.len() as f64)
    };
    let against = |only_mlp| {
        let dense = total(|part| Some(part.dense), only_mlp).unwrap_or(0.0);
        let unit = Unit::of(dense);
        or_dash(total(|part| part.own, only_mlp), |own| {
            format!("{} of {}: {}", unit.show(own), unit.show(dense), percent(own / dense))
        })
    };
    let kl = facts.chosen().map(|point| f64::from(point.kl)).filter(|kl| !kl.is_nan());
    html.raw("<div class=\"tiles\">");
    html.terms(&[
        ("MLP bytes a token, of dense", against(true)),
        ("All bytes a token, of dense", against(false)),
        ("KL from dense on unseen text, nats a token", or_dash(kl, charts::trimmed)),
        ("Rows kept", or_dash(mean(|rows| rows.kept), percent)),
        ("Rows active", or_dash(mean(|rows| rows.active), percent)),
    ]);
    html.raw("</div>\n");
}

fn figure(html: &mut Html, title: &str, svg: &Svg, legend: &[(Role, String)], caption: &str) {
    html.nest("figure", |html| {
        html.element("h3", title);
        html.svg(svg);
        if !legend.is_empty() {
            html.raw("<ul class=\"legend\">");
            for (role, name) in legend {
                html.nest("li", |html| {
                    html.svg(&charts::key(*role));
                    html.text(name);
                });
            }
            html.raw("</ul>");
        }
        if !caption.is_empty() {
            html.element("figcaption", caption);
        }
    });
    html.raw("\n");
}

fn bytes_by_part(html: &mut Html, parts: &[Part]) {
    let unit =
        Unit::of(parts.iter().flat_map(|part| [part.dense, part.own.unwrap_or(0.0)]).fold(0.0, f64::max));
    let bars: Vec<Bar> = parts
        .iter()
        .map(|&Part { name, dense, own }| Bar {
            title: match own {
                Some(own) if own != dense => {
                    format!("{name}: {} (dense {})", unit.show(own), unit.show(dense))
                }
                Some(own) => format!("{name}: {}", unit.show(own)),
                None => format!("{name}: not measured (dense {})", unit.show(dense)),
            },
            dense: unit.in_it(dense),
            own: own.map(|own| unit.in_it(own)),
        })
        .collect();
    let label = format!(
        "Bars: bytes that a token reads, by part, against a dense token. {}",
        bars.iter().map(|bar| bar.title.as_str()).collect::<Vec<_>>().join("; ")
    );
    html.element("h2", "Bytes a token reads, by part");
    html.raw("<div class=\"charts\">");
    figure(
        html,
        "This file against dense",
        &charts::bars(&label, &format!("{} a token", unit.1), &bars),
        &[(Role::Base, "dense".to_owned()), (Role::Own, "this file".to_owned())],
        "The cache of keys and values, which grows with the context, is not counted.",
    );
    html.raw("</div>\n");
    let cells = |&Part { name, dense, own }: &Part| {
        let share = own.filter(|_| dense > 0.0).map(|own| own / dense);
        vec![
            name.to_owned(),
            format!("{dense:.0}"),
            or_dash(own, |own| format!("{own:.0}")),
            share.map_or_else(|| "-".to_owned(), percent),
        ]
    };
    let mut table: Vec<Vec<String>> = parts.iter().map(cells).collect();
    let dense = parts.iter().map(|part| part.dense).sum();
    table.push(cells(&Part { name: "all", dense, own: parts.iter().map(|part| part.own).sum() }));
    html.table("bytes a token, by part", &["part", "dense", "this file", "of dense"], &table);
}

fn by_layer(html: &mut Html, facts: &Facts, rows: &[Rows]) {
    html.element("h2", "By layer");
    let is_measured = rows.iter().any(|rows| rows.kept.is_some());
    if is_measured {
        let shares =
            |role, of: fn(&Rows) -> Option<f64>| Share { role, values: rows.iter().map(of).collect() };
        let range = |share: &Share| {
            let values = share.values.iter().flatten();
            values.fold((1.0f64, 0.0f64), |(low, high), &value| (low.min(value), high.max(value)))
        };
        let says = |what: &str, share: &Share| {
            let (low, high) = range(share);
            format!("Line: {what} by layer, {} to {}.", percent(low), percent(high))
        };
        let (active, kept) =
            (shares(Role::Series(2), |rows| rows.active), shares(Role::Series(0), |rows| rows.kept));
        let recall = shares(Role::Series(3), |rows| rows.recall);
        let missed = shares(Role::Series(7), |rows| rows.missed_energy);
        let label = format!("{} {}", says("rows active", &active), says("rows kept", &kept));
        let most = |shares: &[&Share]| shares.iter().map(|share| range(share).1).fold(1e-4, f64::max) * 1.1;
        let top = most(&[&active, &kept]).min(1.0);
        html.raw("<div class=\"charts\">");
        figure(
            html,
            "Rows active and kept",
            &charts::layers(&label, "% of rows", (0.0, top), &[active, kept]),
            &[(Role::Series(2), "active".to_owned()), (Role::Series(0), "kept".to_owned())],
            "",
        );
        let low = (range(&recall).0 - 0.05).clamp(0.0, 0.9);
        let label = says("active rows kept", &recall);
        figure(
            html,
            "Active rows kept (recall)",
            &charts::layers(&label, "% of active rows", (low, 1.0), &[recall]),
            &[],
            "",
        );
        let label = says("energy missed", &missed);
        let top = most(&[&missed]);
        figure(
            html,
            "MLP output energy missed",
            &charts::layers(&label, "% of energy", (0.0, top), &[missed]),
            &[],
            "Share of the energy of the MLP's output in rows left out.",
        );
        html.raw("</div>\n");
    } else {
        html.nest("p", |html| {
            html.raw("The file holds no measured shares: it was converted without calibration.");
            if facts.has_signs {
                html.raw(" With <code>--text</code>, they are measured.");
            }
        });
    }
    let shares = facts.inspection.predictors.iter().zip(rows).map(|(predictor, rows)| {
        let limit = predictor.limit.map(|limit| limit.to_string());
        let limit = limit.or(predictor.threshold.map(|threshold| format!("{threshold:.3}")));
        vec![
            predictor.layer.to_string(),
            predictor.kind.to_owned(),
            limit.unwrap_or_else(|| "-".to_owned()),
            or_dash(rows.active, percent),
            or_dash(rows.kept, percent),
            or_dash(rows.recall, percent),
            or_dash(rows.missed_energy, percent),
            predictor.n_tokens.to_string(),
        ]
    });
    let head =
        ["layer", "predictor", "limit", "active", "kept", "recall", "energy missed", "tokens in calibration"];
    html.table("predictors, by layer", &head, &shares.collect::<Vec<_>>());
}

fn trade_off(html: &mut Html, facts: &Facts, evaluation: Option<&Evaluation>) {
    html.element("h2", "Bytes against quality");
    let dense = facts.bytes.dense_mlp();
    let unit = Unit::of(dense);
    html.nest("p", |html| {
        html.text(
            "MLP bytes of a token, against the mean KL divergence of the next token's distribution from the ",
        );
        html.text(&format!(
            "dense model's. A dense token reads {} of MLP. Left and low is good.",
            unit.show(dense)
        ));
    });
    html.raw("<div class=\"charts\">");
    if !facts.budget.is_empty() {
        stored_trade_off(html, facts, dense, unit);
    }
    if let Some(evaluation) = evaluation {
        measured_trade_off(html, evaluation, unit);
    }
    html.raw("</div>\n");
    if facts.budget.is_empty() {
        html.element("p", "The file holds no curve of budgets: it was converted without calibration.");
    } else {
        let chosen = facts.chosen();
        let points = facts.budget.iter().map(|point| {
            let share = f64::from(point.mlp_bytes);
            let kl = f64::from(point.kl);
            vec![
                unit.show(share * dense),
                percent(share),
                or_dash(Some(kl).filter(|kl| !kl.is_nan()), |kl| format!("{kl:.6}")),
                if chosen == Some(point) { "chosen" } else { "" }.to_owned(),
            ]
        });
        let head = ["MLP bytes a token", "of dense", "KL, nats a token", ""];
        html.table("the curve in the file", &head, &points.collect::<Vec<_>>());
    }
    match evaluation {
        Some(evaluation) => measured_table(html, evaluation),
        None if !facts.has_signs => {
            html.element("p", "The file was made without prediction: there is nothing to compare.");
        }
        None => html.nest("p", |html| {
            html.raw("This page shows what the file holds. Every kind of predictor and the rule of SparseInfer ");
            html.raw("at several alphas, measured on a text of your own: <code>prep report FILE --text TEXT.txt -o ");
            html.raw("report.html</code>.");
        }),
    }
}

fn stored_trade_off(html: &mut Html, facts: &Facts, dense: f64, unit: Unit) {
    let at = |point: &BudgetPoint| (unit.in_it(f64::from(point.mlp_bytes) * dense), f64::from(point.kl));
    let chosen = facts.chosen().map(at).filter(is_drawn);
    let mut points: Vec<(f64, f64)> = facts.budget.iter().map(at).filter(is_drawn).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    if points.is_empty() {
        return;
    }
    let label = format!(
        "Curve: KL divergence over MLP bytes a token, {} budgets. {}",
        points.len(),
        chosen.map_or_else(String::new, |(bytes, kl)| {
            format!("Chosen: {} {} at {}.", charts::trimmed(bytes), unit.1, charts::trimmed(kl))
        })
    );
    let mut legend = vec![(Role::Series(0), "budgets in the file".to_owned())];
    legend.extend(chosen.map(|_| (Role::Chosen, "chosen".to_owned())));
    let curves = [TradeOff { role: Role::Series(0), points }];
    let x_desc = format!("MLP {} a token", unit.1);
    figure(
        html,
        "Stored in the file",
        &charts::trade_offs(&label, &x_desc, &curves, chosen),
        &legend,
        "On calibration text that neither limits nor budgets were chosen by.",
    );
}

/// The rows of one curve, and the name of the curve.
fn curve_of(row: &EvalRow) -> Option<(Role, &'static str)> {
    let paper = "sign rule of SparseInfer, by alpha";
    Some(match row.predictor.as_str() {
        "auto" => (Role::Series(1), "auto: the best kind for each layer"),
        "sign" => (Role::Series(2), "sign"),
        "sign-x8" => (Role::Series(3), "sign-x8"),
        "low-rank" => (Role::Series(4), "low-rank"),
        "low-rank-sign" => (Role::Series(8), "low-rank-sign"),
        "w2" => (Role::Series(5), "w2"),
        "w3" => (Role::Series(6), "w3"),
        name if name.starts_with("alpha=") => (Role::Series(7), paper),
        _ => return None,
    })
}

fn measured_trade_off(html: &mut Html, evaluation: &Evaluation, unit: Unit) {
    let at = |row: &EvalRow| (unit.in_it(row.bytes_per_token), row.quality.kl_mean);
    let stored = evaluation.rows.iter().find(|row| row.predictor == "stored");
    let chosen = stored.map(at).filter(is_drawn);
    let mut legend: Vec<(Role, String)> = Vec::new();
    let mut curves: Vec<TradeOff> = Vec::new();
    for row in &evaluation.rows {
        let Some((role, name)) = curve_of(row) else { continue };
        let known = curves.iter().position(|curve| curve.role == role);
        let curve = known.unwrap_or_else(|| {
            legend.push((role, name.to_owned()));
            curves.push(TradeOff { role, points: Vec::new() });
            curves.len() - 1
        });
        curves[curve].points.extend(Some(at(row)).filter(is_drawn));
    }
    for curve in &mut curves {
        curve.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    if curves.iter().all(|curve| curve.points.is_empty()) && chosen.is_none() {
        return;
    }
    legend.extend(chosen.map(|_| (Role::Chosen, "this file".to_owned())));
    let label = format!(
        "Curves: KL divergence over MLP bytes a token, measured on {} tokens, for {}.",
        evaluation.n_tokens,
        legend.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ")
    );
    let exact = evaluation.rows.iter().find(|row| row.predictor == "exact");
    let exact = exact.map_or_else(String::new, |row| {
        format!(" Exact, which misses nothing, reads {}.", unit.show(row.bytes_per_token))
    });
    figure(
        html,
        "Measured on your text",
        &charts::trade_offs(&label, &format!("MLP {} a token", unit.1), &curves, chosen),
        &legend,
        &format!("{} tokens; kinds are fitted on the built-in text.{exact}", evaluation.n_tokens),
    );
}

fn measured_table(html: &mut Html, evaluation: &Evaluation) {
    let unit = Unit::of(evaluation.dense_mlp_bytes);
    let rows = evaluation.rows.iter().map(|row| {
        let quality = &row.quality;
        vec![
            row.predictor.clone(),
            row.target_kl.map_or_else(|| "-".to_owned(), |target| target.to_string()),
            format!("{:.6}", quality.kl_mean),
            format!("{:.4}", quality.kl_p99),
            format!("{:.3}", quality.kl_max),
            percent(quality.top1_agreement),
            format!("{:+.2} %", 100.0 * (quality.ppl / evaluation.dense_ppl - 1.0)),
            percent(row.rows_kept),
            percent(row.recall),
            percent(row.missed_energy),
            unit.show(row.bytes_per_token),
            percent(row.mlp_bytes),
            format!("{:.1}", row.tok_per_s),
        ]
    });
    let head = [
        "predictor",
        "fitted for KL",
        "KL mean",
        "p99",
        "max",
        "same top token",
        "perplexity",
        "rows kept",
        "recall",
        "energy missed",
        "MLP bytes a token",
        "of dense",
        "tok/s",
    ];
    html.table("every predictor on your text", &head, &rows.collect::<Vec<_>>());
    html.nest("p", |html| {
        html.text(&format!(
            "Dense perplexity {:.4}. Decoded on {}; speeds are of this one run.",
            evaluation.dense_ppl, evaluation.backend
        ));
    });
}

fn provenance(html: &mut Html, facts: &Facts) {
    html.element("h2", "Where it came from");
    html.raw("<div class=\"origin\">");
    let mut terms = vec![("blake3 of the file", facts.inspection.blake3.clone())];
    let Some(provenance) = &facts.inspection.provenance else {
        html.terms(&terms);
        html.raw("</div>\n");
        html.element("p", "The file does not say where it came from.");
        return;
    };
    terms.push(("source", provenance.source_name.clone()));
    terms.push(("converter", provenance.tool.clone()));
    if let Some(text) = &provenance.calibration {
        terms.push(("calibration text", text.name.clone()));
        terms.push(("its blake3", text.blake3.clone()));
        terms.push(("calibration tokens", format!("{} in windows of {}", text.n_tokens, text.window)));
    }
    html.terms(&terms);
    html.raw("</div>\n");
    let options: Vec<Vec<String>> =
        provenance.options.iter().map(|(name, value)| vec![name.clone(), value.clone()]).collect();
    html.table("settings of the conversion", &["option", "value"], &options);
    let files = provenance.source_files.iter();
    let files = files.map(|file| vec![file.name.clone(), file.bytes.to_string(), file.blake3.clone()]);
    html.table("source files", &["file", "bytes", "blake3"], &files.collect::<Vec<_>>());
}

/// A point that a logarithmic axis can show.
fn is_drawn(point: &(f64, f64)) -> bool {
    point.0.is_finite() && point.1.is_finite() && point.1 > 0.0
}

#[cfg(test)]
mod tests {
    use runtime::perplexity::LayerQuality;

    use super::*;
    use crate::predict::Measured;
    use crate::{ConvertOptions, Predictor, convert};

    const HOSTILE: &str = "</title><script src=http://x>\"'&\u{0}\u{202e}";

    /// The bundled model with signs alone, and what a calibration would have stored.
    fn facts() -> Facts {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/relu-llama-8m");
        let out = folder.path().join("out.sinf");
        let options = ConvertOptions {
            dtype: None,
            predictor: Some(Predictor::Alpha(vec![1.05])),
            n_threads: 1,
            device: runtime::device::Device::Cpu,
            force: false,
        };
        convert(&model, &out, &options, &Progress::silent()).expect("converted");
        let mut facts = Facts::read(&out).expect("valid");
        for record in &mut facts.records {
            record.rows_active = 0.1;
            record.rows_kept = 0.25;
            record.recall = 0.5;
            record.missed_energy = 0.001;
        }
        let limits: Vec<f32> = facts.records.iter().map(|record| record.limit as f32).collect();
        let point = |kl, mlp_bytes, add: f32| BudgetPoint {
            kl,
            mlp_bytes,
            limits: limits.iter().map(|limit| limit + add).collect(),
        };
        facts.budget = vec![
            point(0.0, 0.9, 2.0),
            point(0.001, 0.5, 1.0),
            point(0.01, 0.25, 0.0),
            point(f32::NAN, 0.2, -1.0),
        ];
        facts
    }

    fn evaluation() -> Evaluation {
        let layer = LayerQuality {
            rows_kept: 0.3,
            rows_active: 0.1,
            recall: 0.9,
            missed_energy: 0.01,
            predictor: "sign",
            limit: Some(130.0),
            alpha: Some(1.0),
        };
        let row = |predictor: &str, target_kl, kl_mean, bytes_per_token| EvalRow {
            predictor: predictor.to_owned(),
            target_kl,
            gate_bytes: 0.4,
            mlp_bytes: 0.3,
            bytes_per_token,
            rows_kept: 0.3,
            rows_active: 0.1,
            recall: 0.9,
            missed_energy: 0.01,
            quality: Measured {
                ppl: 21.0,
                kl_mean,
                kl_p99: 0.1,
                kl_max: 1.0,
                top1_agreement: 0.97,
                layers: vec![layer; 8],
                kl_by_residue: Vec::new(),
            },
            kinds: vec!["sign"; 8],
            layer_bytes: vec![1e5; 8],
            tok_per_s: 12.5,
        };
        let mut rows =
            vec![row("dense", None, 0.0, 8e6), row("exact", None, 0.0, 4e6), row("stored", None, 0.002, 2e6)];
        for kind in ["auto", "sign", "sign-x8", "low-rank", "low-rank-sign", "w2", "w3"] {
            rows.push(row(kind, Some(0.001), 0.0011, 2.1e6));
            rows.push(row(kind, Some(0.01), 0.012, 1.7e6));
        }
        rows.extend([row("alpha=1", None, 0.1, 1.8e6), row("alpha=1.1", None, 0.004, 3e6)]);
        Evaluation {
            path: HOSTILE.to_owned(),
            n_tokens: 77,
            dense_ppl: 20.0,
            dense_mlp_bytes: 8e6,
            backend: "cpu".to_owned(),
            rows,
        }
    }

    /// The page's inline charts, each parsed as XML.
    fn check(page: &str) -> usize {
        for foreign in
            ["http", "src=", "href", "<script", "url(", "@import", "<link", "<iframe", "\u{202e}", "\u{0}"]
        {
            let at = page.replace("src=http://x&gt;", "").replace(foreign, "");
            let expected = page.replace("src=http://x&gt;", "");
            assert_eq!(at, expected, "the page has {foreign}");
        }
        let mut n_charts = 0;
        for (at, _) in page.match_indices("<svg") {
            let end = page[at..].find("</svg>").expect("closed") + "</svg>".len();
            let svg = &page[at..at + end];
            let tree = roxmltree::Document::parse(svg).unwrap_or_else(|error| panic!("{error}: {svg}"));
            let root = tree.root_element();
            assert_ne!(root.has_attribute("aria-hidden"), root.has_attribute("aria-label"), "{svg}");
            n_charts += usize::from(root.attribute("role") == Some("img"));
            for node in tree.descendants().filter(roxmltree::Node::is_element) {
                for name in ["fill", "stroke"] {
                    let colour = node.attribute(name).unwrap_or("none");
                    assert_eq!(colour, "none", "colours come from the style sheet: {svg}");
                }
                if let Some(class) = node.attribute("class") {
                    assert!(page.contains(&format!(".{class} {{")), "no style for {class}");
                }
                let numbers =
                    ["x", "y", "width", "height", "points"].map(|name| node.attribute(name).unwrap_or(""));
                assert!(!numbers.concat().contains("NaN"), "{svg}");
            }
        }
        n_charts
    }

    #[test]
    fn a_page_has_every_section_chart_and_layer() {
        let (facts, evaluation) = (facts(), evaluation());
        let stored = page(&facts, None);
        assert_eq!(check(&stored), 5, "parts, rows, recall, energy, stored curve");
        let measured = page(&facts, Some(&evaluation));
        assert_eq!(check(&measured), 6, "the measured curves too");
        let headings = |page: &str| -> Vec<String> {
            let parts = page.split("<h2>").skip(1);
            parts.map(|part| part.split_once('<').expect("closed").0.to_owned()).collect()
        };
        let expected =
            ["Bytes a token reads, by part", "By layer", "Bytes against quality", "Where it came from"];
        assert_eq!(
            (headings(&stored), headings(&measured)),
            (expected.map(str::to_owned).to_vec(), expected.map(str::to_owned).to_vec())
        );
        let layers = measured.split("predictors, by layer</caption>").nth(1).expect("the table");
        for layer in 0..8 {
            assert!(
                layers.contains(&format!("<tr><th scope=\"row\">{layer}</th><td>sign</td>")),
                "layer {layer}"
            );
        }
        assert!(stored.contains("--text TEXT.txt") && !measured.contains("--text TEXT.txt"));
        for name in [
            "sign-x8",
            "low-rank-sign",
            "w2",
            "w3",
            "auto: the best",
            "sign rule of SparseInfer",
            "this file",
        ] {
            assert!(measured.contains(name), "{name}");
        }
        for row in &evaluation.rows {
            assert!(
                measured.contains(&format!("<th scope=\"row\">{}</th>", row.predictor)),
                "{}",
                row.predictor
            );
        }
        assert_eq!(facts.chosen().map(|point| point.kl), Some(0.01));
    }

    #[test]
    fn bytes_are_those_of_the_rows_that_are_read() {
        let facts = facts();
        let parts = facts.bytes.parts(&facts.records, &facts.rows(None));
        let part = |wanted: &str| {
            let &Part { dense, own, .. } = parts.iter().find(|part| part.name == wanted).expect("there");
            (dense, own.expect("known"))
        };
        // Eight layers of 704 rows of 256 columns, f16.
        let dense = 8.0 * 704.0 * 256.0 * 2.0;
        assert_eq!(part("gate"), (dense, 0.25 * dense));
        let (_, up) = part("up");
        assert!((up - 0.05 * dense).abs() < 1.0, "{up}: a tenth is active, half of it kept");
        assert_eq!(part("predictor"), (0.0, dense / 16.0));
        assert_eq!(part("norms"), (17.0 * 256.0 * 4.0, 17.0 * 256.0 * 4.0));
        assert_eq!(facts.bytes.dense_mlp(), 3.0 * dense);
    }

    #[test]
    fn names_from_a_file_are_text() {
        let mut facts = facts();
        facts.file_name = HOSTILE.to_owned();
        let provenance = facts.inspection.provenance.as_mut().expect("there");
        provenance.source_name = HOSTILE.to_owned();
        provenance.tool = HOSTILE.to_owned();
        provenance.options.push((HOSTILE.to_owned(), HOSTILE.to_owned()));
        provenance.source_files[0].name = HOSTILE.to_owned();
        provenance.calibration = Some(crate::inspect::CalibrationRow {
            name: HOSTILE.to_owned(),
            blake3: String::new(),
            n_tokens: 1,
            window: 1,
        });
        let page = page(&facts, Some(&evaluation()));
        check(&page);
        let escaped = "&lt;/title&gt;&lt;script src=http://x&gt;&quot;&#39;&amp;\u{fffd}\u{fffd}";
        // Title, heading, file, source, converter, calibration text, option and value, source file.
        assert_eq!(page.matches(escaped).count(), 9);
    }

    #[test]
    fn a_file_without_statistics_says_so() {
        let mut facts = facts();
        facts.budget.clear();
        for record in &mut facts.records {
            for share in [
                &mut record.rows_active,
                &mut record.rows_kept,
                &mut record.recall,
                &mut record.missed_energy,
            ] {
                *share = f32::NAN;
            }
        }
        facts.inspection.provenance = None;
        let without = page(&facts, None);
        assert_eq!(check(&without), 1, "the bytes by part");
        assert!(without.contains("gate: not measured") && without.contains("does not say where"));
        // What was measured stands in.
        let with = page(&facts, Some(&evaluation()));
        assert_eq!(check(&with), 5);
        assert!(!with.contains("gate: not measured"));
    }
}
