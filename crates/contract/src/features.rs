//! The canonical text of a feature: what a feature token embeds.
//!
//! Two domains that promise the same feature produce the same text, whatever their tables look like. Ranges and
//! categories are left out: a wider range or one more category is still the same feature to a model.

use crate::schema::{Feature, FeatureKind};

impl Feature {
    /// The text: id, kind, unit and description on one line, lower case, single spaces, absent parts left out.
    /// For example `payment.amount | numeric | eur | amount of the payment`.
    #[must_use]
    pub fn text(&self) -> String {
        let kind = match &self.kind {
            FeatureKind::Numeric(_) => "numeric",
            FeatureKind::Categorical { .. } => "categorical",
        };
        let declared =
            [Some(self.id.as_str()), Some(kind), self.unit.as_deref(), self.description.as_deref()];
        let normal = |part: &str| part.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ");
        let parts = declared.into_iter().flatten().map(normal).filter(|part| !part.is_empty());
        parts.collect::<Vec<_>>().join(" | ")
    }
}

#[cfg(test)]
mod tests {
    use crate::schema::{Feature, FeatureId, FeatureKind, NumericDomain, Scale};

    fn amount(upper: f64) -> Feature {
        Feature {
            id: FeatureId::new("payment.amount").unwrap(),
            kind: FeatureKind::Numeric(NumericDomain {
                lower: 0.0,
                upper,
                scale: Scale::Log1p,
                cut_points: None,
            }),
            unit: Some("EUR".into()),
            description: Some("Amount\n  of the  Payment ".into()),
        }
    }

    #[test]
    fn text_is_normalised() {
        assert_eq!(amount(1.0).text(), "payment.amount | numeric | eur | amount of the payment");
    }

    #[test]
    fn absent_parts_are_left_out() {
        let kind = FeatureKind::Categorical { levels: vec!["a".into()] };
        let id = FeatureId::new("person.sex").unwrap();
        let feature = Feature { id, kind, unit: None, description: Some("  ".into()) };
        assert_eq!(feature.text(), "person.sex | categorical");
    }

    #[test]
    fn ranges_do_not_change_the_text() {
        assert_eq!(amount(1.0).text(), amount(1e6).text());
    }
}
