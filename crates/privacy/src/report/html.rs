//! The report as one HTML page: no scripts, no network, printable.
//!
//! The page is a pure function of the signed report, which it embeds; verification renders it again and compares
//! bytes, so no visible figure can be changed without being noticed.

use super::picture::budget_over_time;
use super::section::rounded_up;
use super::{Declaration, ProductSection, RecordedEntry, Report, ReportError, SignedReport};
use crate::budget::{Epsilon, Rho};
use askama::Template;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What stands before the embedded signed report.
pub(super) const EMBED_START: &str = "<script type=\"application/json\" id=\"signed-report\">";
/// What stands after it.
pub(super) const EMBED_END: &str = "</script>";

/// Renders a report with its signature.
///
/// # Errors
/// [`ReportError::Page`] when a picture or the page can't be drawn.
pub fn render_html(report: &Report, signed: &SignedReport) -> Result<String, ReportError> {
    let products = report
        .products
        .iter()
        .map(|section| budget_over_time(section).map(|picture| Product { section, picture }))
        .collect::<Result<Vec<_>, _>>()?;
    // `<` would end the script element; inside JSON strings its escape means the same.
    let embedded = signed.to_json().replace('<', "\\u003c");
    let declarations = report.disjoint.iter().map(|d| d.said()).collect::<Result<Vec<_>, _>>()?;
    let page = Page { report, signed, products, declarations, embedded };
    page.render().map_err(|error| ReportError::Page { reason: error.to_string() })
}

struct Product<'a> {
    section: &'a ProductSection,
    picture: String,
}

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    report: &'a Report,
    signed: &'a SignedReport,
    products: Vec<Product<'a>>,
    declarations: Vec<Declaration>,
    embedded: String,
}

// What the template calls to show figures.
impl Page<'_> {
    fn instant(&self, time_ms: &i64) -> String {
        // Out of the calendar's range only for made-up times; the raw number is shown then.
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(*time_ms) * 1_000_000)
            .ok()
            .and_then(|instant| instant.format(&Rfc3339).ok())
            .unwrap_or_else(|| format!("{time_ms} ms"))
    }

    fn epsilon(&self, epsilon: &Option<Epsilon>) -> String {
        epsilon.as_ref().map_or_else(|| "0".to_owned(), |epsilon| rounded_up(epsilon.get(), 4))
    }

    fn rho(&self, rho: &Rho) -> String {
        rounded_up(rho.as_f64(), 6)
    }

    fn percent(&self, section: &ProductSection) -> String {
        let granted = section.granted.rho.as_f64();
        if granted > 0.0 {
            rounded_up(section.spent.rho.as_f64() / granted * 100.0, 1)
        } else {
            "0".to_owned()
        }
    }

    fn hash(&self, entry: &RecordedEntry) -> String {
        hex::encode(entry.hash)
    }

    fn short<'t>(&self, digest: &'t str) -> &'t str {
        digest.get(..16).unwrap_or(digest)
    }
}
