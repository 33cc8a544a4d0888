//! Charts as inline SVG that the page's style sheet colours.
//!
//! plotters writes fixed colours. Each [`Role`] is drawn in a colour that stands for it alone, and what comes out has a
//! class in the place of that colour: the style sheet then decides, for light and for dark. Texts in a chart are this
//! program's own, never a file's.

use super::html::Html;
use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea};
use plotters::element::{Circle, EmptyElement, PathElement, Polygon, Rectangle, Text};
use plotters::prelude::{Cartesian2d, SVGBackend};
use plotters::series::LineSeries;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, IntoFont, RGBColor, ShapeStyle, TRANSPARENT, TextStyle};

/// Width of a chart in its own units, chosen so that its texts can be read on a telephone.
const WIDTH: u32 = 380;
/// Size of texts. plotters takes a font's height for its size, which is 1.24 times that of CSS.
const FONT: f64 = 13.0 * 1.24;

/// A complete `<svg>` element.
#[derive(Debug)]
pub(super) struct Svg(String);

/// What a colour stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Axes and texts.
    Ink,
    /// Lines of the mesh.
    Grid,
    /// Bars of what is compared with.
    Base,
    /// Bars of what is compared.
    Own,
    /// One of several series, below [`Role::N_SERIES`].
    Series(u8),
    /// What was chosen.
    Chosen,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

impl Role {
    /// Series with colours of their own.
    pub(super) const N_SERIES: u8 = 9;

    fn all() -> impl Iterator<Item = Self> {
        [Self::Ink, Self::Grid, Self::Base, Self::Own, Self::Chosen]
            .into_iter()
            .chain((0..Self::N_SERIES).map(Self::Series))
    }

    /// The end of its class names.
    fn name(self) -> String {
        match self {
            Self::Ink => "ink".to_owned(),
            Self::Grid => "grid".to_owned(),
            Self::Base => "base".to_owned(),
            Self::Own => "own".to_owned(),
            Self::Chosen => "chosen".to_owned(),
            Self::Series(series) => format!("s{series}"),
        }
    }

    /// What stands for it in plotters' output.
    fn colour(self) -> RGBColor {
        match self {
            Self::Ink => RGBColor(1, 0, 0),
            Self::Grid => RGBColor(2, 0, 0),
            Self::Base => RGBColor(3, 0, 0),
            Self::Own => RGBColor(4, 0, 0),
            Self::Chosen => RGBColor(5, 0, 0),
            Self::Series(series) => RGBColor(0, 1 + series % Self::N_SERIES, 0),
        }
    }

    fn line(self, width: u32) -> ShapeStyle {
        self.colour().stroke_width(width)
    }
}

impl Svg {
    pub(super) fn markup(&self) -> &str {
        &self.0
    }

    /// A drawing of `size`. `label`: what the chart says, for those who do not see it; none for a picture that says
    /// nothing new.
    fn draw(size: (u32, u32), label: Option<&str>, draw: impl FnOnce(&Area<'_>) -> Drawn) -> Self {
        let mut drawn = String::new();
        {
            let area = SVGBackend::with_string(&mut drawn, size).into_drawing_area();
            draw(&area).and_then(|()| area.present()).expect("a string takes everything that is drawn");
        }
        let inner = drawn.split_once('>').expect("it starts with the tag of the svg").1;
        let role = match label {
            Some(label) => format!("role=\"img\" aria-label=\"{}\"", Html::escaped(label)),
            None => "aria-hidden=\"true\"".to_owned(),
        };
        let mut svg = format!("<svg viewBox=\"0 0 {} {}\" {role}>{inner}", size.0, size.1);
        for role in Role::all() {
            let (RGBColor(r, g, b), name) = (role.colour(), role.name());
            let colour = format!("#{r:02X}{g:02X}{b:02X}");
            // plotters gives an element one colour at most; the other of fill and stroke is "none".
            svg = svg
                .replace(&format!("fill=\"{colour}\""), &format!("class=\"fill-{name}\""))
                .replace(&format!("stroke=\"{colour}\""), &format!("class=\"line-{name}\""));
        }
        Self(svg)
    }
}

fn text() -> TextStyle<'static> {
    ("sans-serif", FONT).into_font().color(&Role::Ink.colour())
}

/// A part of what a token reads.
#[derive(Debug)]
pub(super) struct Bar {
    /// What it is, with its numbers.
    pub(super) title: String,
    /// Of a dense token.
    pub(super) dense: f64,
    /// Of this file's; none where it is not known.
    pub(super) own: Option<f64>,
}

/// Pairs of bars under each other, dense above own, each pair under its title.
pub(super) fn bars(label: &str, x_desc: &str, bars: &[Bar]) -> Svg {
    let n = bars.len() as f64;
    let most = bars.iter().flat_map(|bar| [bar.dense, bar.own.unwrap_or(0.0)]).fold(0.0, f64::max);
    Svg::draw((WIDTH, 50 + 46 * bars.len() as u32), Some(label), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_left(10)
            .margin_right(16)
            .x_label_area_size(46)
            .build_cartesian_2d(0.0..most.max(f64::MIN_POSITIVE) * 1.02, 0.0..n)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(5)
            .x_desc(x_desc)
            .x_label_formatter(&|x| trimmed(*x))
            .x_label_style(text())
            .axis_desc_style(text())
            .axis_style(Role::Ink.line(1))
            .bold_line_style(Role::Grid.line(1))
            .light_line_style(TRANSPARENT)
            .draw()?;
        let title = text().pos(Pos::new(HPos::Left, VPos::Center));
        for (idx, bar) in bars.iter().enumerate() {
            let top = n - idx as f64;
            let bar_at = |from: f64, to: f64, value: f64, role: Role| {
                Rectangle::new([(0.0, top - from), (value, top - to)], role.colour().filled())
            };
            chart.draw_series([bar_at(0.42, 0.62, bar.dense, Role::Base)])?;
            chart.draw_series(bar.own.map(|own| bar_at(0.66, 0.86, own, Role::Own)))?;
            chart.draw_series([Text::new(bar.title.clone(), (0.0, top - 0.22), title.clone())])?;
        }
        Ok(())
    })
}

/// A share of each layer, in percent.
#[derive(Debug)]
pub(super) struct Share {
    /// Colour and marker.
    pub(super) role: Role,
    /// 0 to 1, one for each layer; none where it is not known.
    pub(super) values: Vec<Option<f64>>,
}

/// Shares by layer, over a range of shares.
pub(super) fn layers(label: &str, y_desc: &str, range: (f64, f64), shares: &[Share]) -> Svg {
    let n = shares.iter().map(|share| share.values.len()).max().unwrap_or(0) as f64;
    Svg::draw((WIDTH, 270), Some(label), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .x_label_area_size(46)
            .y_label_area_size(62)
            .build_cartesian_2d(-0.5..n - 0.5, 100.0 * range.0..100.0 * range.1)?;
        let layer = |x: &f64| if x.fract() == 0.0 { trimmed(*x) } else { String::new() };
        mesh(&mut chart, ("layer", &layer), (y_desc, &|y| trimmed(*y)), 6)?;
        for share in shares {
            let values = share.values.iter().enumerate();
            let points: Vec<Option<(f64, f64)>> =
                values.map(|(layer, value)| value.map(|value| (layer as f64, 100.0 * value))).collect();
            // A layer that was not measured leaves a gap.
            for run in points.split(Option::is_none) {
                let run: Vec<(f64, f64)> = run.iter().flatten().copied().collect();
                curve(&mut chart, share.role, &run)?;
            }
        }
        Ok(())
    })
}

/// A way to trade bytes for divergence.
#[derive(Debug)]
pub(super) struct TradeOff {
    /// Colour and marker.
    pub(super) role: Role,
    /// Bytes of a token and divergence above 0, in the order of bytes.
    pub(super) points: Vec<(f64, f64)>,
}

/// Divergence, on a logarithmic axis, over bytes. `chosen` has a ring around it.
pub(super) fn trade_offs(label: &str, x_desc: &str, curves: &[TradeOff], chosen: Option<(f64, f64)>) -> Svg {
    let all = || curves.iter().flat_map(|curve| &curve.points).chain(&chosen);
    let range = |of: fn(&(f64, f64)) -> f64| {
        all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), value| (a.min(value), b.max(value)))
    };
    let (x, y) = (range(|point| point.0), range(|point| point.1.log10()));
    let margin = 0.06 * (x.1 - x.0) + 0.01 * x.1;
    // Whole decades, one at least.
    let (low, high) = (y.0.floor(), y.1.ceil().max(y.0.floor() + 1.0));
    Svg::draw((WIDTH, 360), Some(label), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .x_label_area_size(46)
            .y_label_area_size(76)
            .build_cartesian_2d((x.0 - margin).max(0.0)..x.1 + margin, low..high)?;
        let divergence = |y: &f64| trimmed(10f64.powf(*y));
        mesh(
            &mut chart,
            (x_desc, &|x| trimmed(*x)),
            ("KL, nats a token", &divergence),
            1 + (high - low) as usize,
        )?;
        for of in curves {
            let points: Vec<(f64, f64)> = of.points.iter().map(|point| (point.0, point.1.log10())).collect();
            curve(&mut chart, of.role, &points)?;
        }
        if let Some((bytes, kl)) = chosen {
            let at = (bytes, kl.log10());
            chart.draw_series([Circle::new(at, 9, Role::Chosen.line(2))])?;
            chart.draw_series([Circle::new(at, 4, Role::Chosen.colour().filled())])?;
        }
        Ok(())
    })
}

/// A piece of a curve, for the legend.
pub(super) fn key(role: Role) -> Svg {
    Svg::draw((34, 16), None, |area| match role {
        Role::Base | Role::Own => area.draw(&Rectangle::new([(3, 3), (31, 13)], role.colour().filled())),
        Role::Chosen => {
            area.draw(&Circle::new((17, 8), 7, role.line(2)))?;
            area.draw(&Circle::new((17, 8), 3, role.colour().filled()))
        }
        role => {
            area.draw(&PathElement::new([(1, 8), (33, 8)], role.line(2)))?;
            match marker(role) {
                Marker::Disc => area.draw(&Circle::new((17, 8), 4, role.colour().filled())),
                Marker::Shape(corners) => {
                    let corners: Vec<(i32, i32)> = corners.iter().map(|(x, y)| (17 + x, 8 + y)).collect();
                    area.draw(&Polygon::new(corners, role.colour().filled()))
                }
            }
        }
    })
}

/// So that series differ to those who do not see their colours.
enum Marker {
    Disc,
    /// Corners around the point, in units of the chart.
    Shape(&'static [(i32, i32)]),
}

fn marker(role: Role) -> Marker {
    let Role::Series(series) = role else { return Marker::Disc };
    match series % 4 {
        0 => Marker::Disc,
        1 => Marker::Shape(&[(-4, -4), (4, -4), (4, 4), (-4, 4)]),
        2 => Marker::Shape(&[(0, -5), (5, 4), (-5, 4)]),
        _ => Marker::Shape(&[(0, -6), (6, 0), (0, 6), (-6, 0)]),
    }
}

/// What a value is called on an axis.
type Name<'a> = &'a dyn Fn(&f64) -> String;

fn mesh(chart: &mut Chart<'_, '_>, x: (&str, Name<'_>), y: (&str, Name<'_>), n_y_labels: usize) -> Drawn {
    chart
        .configure_mesh()
        .x_labels(6)
        .y_labels(n_y_labels)
        .x_desc(x.0)
        .y_desc(y.0)
        .x_label_formatter(x.1)
        .y_label_formatter(y.1)
        .x_label_style(text())
        .y_label_style(text())
        .axis_desc_style(text())
        .axis_style(Role::Ink.line(1))
        .bold_line_style(Role::Grid.line(1))
        .light_line_style(TRANSPARENT)
        .draw()
}

/// A line through `points`, with markers.
fn curve(chart: &mut Chart<'_, '_>, role: Role, points: &[(f64, f64)]) -> Drawn {
    chart.draw_series(LineSeries::new(points.iter().copied(), role.line(2)))?;
    match marker(role) {
        Marker::Disc => {
            let style = role.colour().filled();
            chart.draw_series(points.iter().map(|&at| Circle::new(at, 4, style)))?;
        }
        Marker::Shape(corners) => {
            let style = role.colour().filled();
            let shape = |&at: &(f64, f64)| EmptyElement::at(at) + Polygon::new(corners, style);
            chart.draw_series(points.iter().map(shape))?;
        }
    }
    Ok(())
}

/// At most three significant digits, without the zeros at the end.
pub(super) fn trimmed(value: f64) -> String {
    if value.abs() < 1e-12 {
        return "0".to_owned();
    }
    let n_decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.n_decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_at_most() {
        let cases =
            [(0.0, "0"), (12_345.0, "12345"), (99.96, "100"), (2.5, "2.5"), (0.000_123_4, "0.000123")];
        for (value, expected) in cases {
            assert_eq!(trimmed(value), expected);
        }
    }

    #[test]
    fn odd_numbers_of_layers_and_points_are_drawn() {
        for n in [1, 2, 80] {
            let values = (0..n).map(|layer| (layer != 1).then_some(0.5)).collect();
            let svg = layers("a", "%", (0.0, 1.0), &[Share { role: Role::Series(0), values }]);
            let n_measured = if n == 1 { 1 } else { n - 1 };
            assert_eq!(svg.markup().matches("<circle").count(), n_measured);
        }
        let one = TradeOff { role: Role::Series(0), points: vec![(1.0, 0.001)] };
        let svg = trade_offs("a", "MB", &[one], Some((1.0, 0.001)));
        assert_eq!(svg.markup().matches("<circle").count(), 3, "{}", svg.markup());
        assert!(!svg.markup().contains("NaN"));
    }
}
