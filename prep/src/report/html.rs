//! HTML that cannot be broken by what a file says.
//!
//! Markup is `&'static str`; everything else goes through [`Html::text`], or is a chart of [`super::charts`].

use super::charts::Svg;

/// A page, or a part of one, in the making.
#[derive(Debug, Default)]
pub(super) struct Html(String);

impl Html {
    /// Markup of this program.
    pub(super) fn raw(&mut self, markup: &'static str) {
        self.0.push_str(markup);
    }

    /// Text from anywhere. Characters that HTML forbids, and those that turn the direction of what follows, become
    /// U+FFFD.
    pub(super) fn text(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '&' => self.0.push_str("&amp;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => self.0.push('\u{fffd}'),
                c if c.is_control() => self.0.push('\u{fffd}'),
                c => self.0.push(c),
            }
        }
    }

    /// `text` as it may stand in an element or between quotes.
    pub(super) fn escaped(text: &str) -> String {
        let mut html = Self::default();
        html.text(text);
        html.finish()
    }

    /// A chart.
    pub(super) fn svg(&mut self, svg: &Svg) {
        self.0.push_str(svg.markup());
    }

    /// `<TAG>text</TAG>`.
    pub(super) fn element(&mut self, tag: &'static str, text: &str) {
        self.nest(tag, |html| html.text(text));
    }

    /// `<TAG>...</TAG>`.
    pub(super) fn nest(&mut self, tag: &'static str, inner: impl FnOnce(&mut Self)) {
        self.0.push('<');
        self.0.push_str(tag);
        self.0.push('>');
        inner(self);
        self.0.push_str("</");
        self.0.push_str(tag);
        self.0.push('>');
    }

    /// A table that scrolls by itself where the page is narrow, folded away under its caption.
    pub(super) fn table(&mut self, caption: &str, head: &[&str], rows: &[Vec<String>]) {
        self.nest("details", |html| {
            html.nest("summary", |html| {
                html.raw("Numbers: ");
                html.text(caption);
            });
            html.raw("<div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"");
            html.text(caption);
            html.raw("\"><table><caption>");
            html.text(caption);
            html.raw("</caption><thead><tr>");
            for cell in head {
                html.raw("<th scope=\"col\">");
                html.text(cell);
                html.raw("</th>");
            }
            html.raw("</tr></thead><tbody>\n");
            for row in rows {
                html.raw("<tr>");
                for (column, cell) in row.iter().enumerate() {
                    html.raw(if column == 0 { "<th scope=\"row\">" } else { "<td>" });
                    html.text(cell);
                    html.raw(if column == 0 { "</th>" } else { "</td>" });
                }
                html.raw("</tr>\n");
            }
            html.raw("</tbody></table></div>");
        });
        self.raw("\n");
    }

    /// A list of terms and what they are.
    pub(super) fn terms(&mut self, terms: &[(&str, String)]) {
        self.nest("dl", |html| {
            for (term, value) in terms {
                html.nest("div", |html| {
                    html.element("dt", term);
                    html.element("dd", value);
                });
            }
        });
    }

    /// The page.
    pub(super) fn finish(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_never_markup() {
        let mut html = Html::default();
        html.element("p", "<script>'\"&\u{0}\u{1b}\u{202e}\n");
        assert_eq!(html.finish(), "<p>&lt;script&gt;&#39;&quot;&amp;\u{fffd}\u{fffd}\u{fffd}\u{fffd}</p>");
    }
}
