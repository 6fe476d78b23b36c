//! A dataset's card in Croissant: one file, its columns, what may be done with it and what it can't show.
//!
//! JSON-LD after the Croissant format 1.1 of MLCommons with the properties of its responsible-AI vocabulary. A card is
//! made for files that are differentially private already; it says nothing about rows of a domain.

use serde_json::{Value, json};

use crate::schema::{FeatureKind, FeatureSchema};

/// What is said about a dataset of one comma-separated file.
#[derive(Debug, Clone)]
pub struct DatasetFacts<'a> {
    /// Name of the dataset.
    pub name: &'a str,
    /// What it is.
    pub description: &'a str,
    /// Address or name of its licence, if one was given.
    pub licence: Option<&'a str>,
    /// Version of the dataset, `major.minor.patch`.
    pub version: &'a str,
    /// Day of publication, `YYYY-MM-DD`.
    pub published: &'a str,
    /// The file's name beside the card.
    pub file: &'a str,
    /// The file's length.
    pub file_bytes: u64,
    /// SHA-256 of the file, hexadecimal.
    pub file_sha256: &'a str,
    /// Its columns: the features under their canonical ids in the schema's order, then the target.
    pub schema: &'a FeatureSchema,
    /// How it was made, and the guarantee it stands under.
    pub collection: &'a str,
    /// What it must not be read as.
    pub limitations: &'a str,
    /// What it is for.
    pub uses: &'a str,
}

/// The card of a dataset as a JSON-LD document.
#[must_use]
pub fn croissant(facts: &DatasetFacts<'_>) -> Value {
    let column = |id: &str, description: String, data_type: &str| {
        json!({
            "@type": "cr:Field",
            "@id": format!("rows/{id}"),
            "name": id,
            "description": description,
            "dataType": data_type,
            "source": { "fileObject": { "@id": facts.file }, "extract": { "column": id } },
        })
    };
    let mut fields: Vec<Value> = facts
        .schema
        .features()
        .iter()
        .map(|feature| {
            let unit = feature.unit.as_ref().map_or_else(String::new, |unit| format!(", in {unit}"));
            let said = feature.description.as_ref().map_or_else(String::new, |text| format!("{text}; "));
            match &feature.kind {
                FeatureKind::Numeric(domain) => {
                    let range = format!("{said}declared range {} to {}{unit}", domain.lower, domain.upper);
                    column(feature.id.as_str(), range, "sc:Float")
                }
                FeatureKind::Categorical { levels } => {
                    let levels = format!("{said}declared levels: {}", levels.join(", "));
                    column(feature.id.as_str(), levels, "sc:Text")
                }
            }
        })
        .collect();
    let target = facts.schema.target();
    let classes = format!("target; declared classes: {}", target.classes.join(", "));
    fields.push(column(target.id.as_str(), classes, "sc:Text"));
    let mut card = json!({
        "@context": context(),
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": facts.name,
        "description": facts.description,
        "version": facts.version,
        "datePublished": facts.published,
        "rai:dataCollection": facts.collection,
        "rai:dataLimitations": facts.limitations,
        "rai:dataUseCases": facts.uses,
        "distribution": [{
            "@type": "cr:FileObject",
            "@id": facts.file,
            "name": facts.file,
            "contentUrl": facts.file,
            "contentSize": format!("{} B", facts.file_bytes),
            "encodingFormat": "text/csv",
            "sha256": facts.file_sha256,
        }],
        "recordSet": [{ "@type": "cr:RecordSet", "@id": "rows", "name": "rows", "field": fields }],
    });
    if let (Some(licence), Some(card)) = (facts.licence, card.as_object_mut()) {
        card.insert("license".to_owned(), licence.into());
    }
    card
}

/// The vocabulary, as the format prescribes it.
fn context() -> Value {
    let typed = |id: &str, kind: &str| json!({ "@id": id, "@type": kind });
    let mut context = serde_json::Map::new();
    context.insert("@language".into(), "en".into());
    context.insert("@vocab".into(), "https://schema.org/".into());
    context.insert("sc".into(), "https://schema.org/".into());
    context.insert("cr".into(), "http://mlcommons.org/croissant/".into());
    context.insert("rai".into(), "http://mlcommons.org/croissant/RAI/".into());
    context.insert("dct".into(), "http://purl.org/dc/terms/".into());
    context.insert("conformsTo".into(), "dct:conformsTo".into());
    context.insert("data".into(), typed("cr:data", "@json"));
    context.insert("examples".into(), typed("cr:examples", "@json"));
    context.insert("dataType".into(), typed("cr:dataType", "@vocab"));
    for term in TERMS {
        context.insert(term.into(), format!("cr:{term}").into());
    }
    Value::Object(context)
}

const CONFORMS_TO: &str = "http://mlcommons.org/croissant/1.1";
/// Terms that the format maps to its own vocabulary under their own names.
const TERMS: [&str; 26] = [
    "citeAs",
    "column",
    "extract",
    "field",
    "fileObject",
    "fileProperty",
    "fileSet",
    "format",
    "includes",
    "isLiveDataset",
    "jsonPath",
    "key",
    "md5",
    "parentField",
    "path",
    "recordSet",
    "references",
    "regex",
    "repeated",
    "replace",
    "separator",
    "source",
    "subField",
    "transform",
    "equivalentProperty",
    "samplingRate",
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use super::*;
    use crate::schema::{Feature, FeatureId, NumericDomain, Scale, Target};

    #[test]
    fn every_column_of_the_file_is_a_field_that_names_it() {
        let feature = |id: &str, kind: FeatureKind| Feature {
            id: FeatureId::new(id).unwrap(),
            kind,
            unit: Some("years".to_owned()),
            description: None,
        };
        let age = NumericDomain { lower: 0.0, upper: 99.0, scale: Scale::Linear, cut_points: None };
        let features = vec![
            feature("person.age", FeatureKind::Numeric(age)),
            feature("person.work", FeatureKind::Categorical { levels: vec!["full".into(), "part".into()] }),
        ];
        let target = Target {
            id: FeatureId::new("person.income").unwrap(),
            classes: vec!["low".into(), "high".into()],
        };
        let schema = FeatureSchema::new(features, target).unwrap();
        let facts = DatasetFacts {
            name: "corpus",
            description: "rows",
            licence: None,
            version: "1.0.0",
            published: "2026-01-31",
            file: "corpus.csv",
            file_bytes: 12,
            file_sha256: "ab",
            schema: &schema,
            collection: "drawn",
            limitations: "none",
            uses: "tests",
        };
        let card = croissant(&facts);
        let fields = card["recordSet"][0]["field"].as_array().unwrap();
        let columns: Vec<&str> =
            fields.iter().map(|f| f["source"]["extract"]["column"].as_str().unwrap()).collect();
        assert_eq!(columns, ["person.age", "person.work", "person.income"]);
        assert_eq!(fields[0]["dataType"], "sc:Float");
        assert_eq!(fields[0]["description"], "declared range 0 to 99, in years");
        assert_eq!(card["distribution"][0]["sha256"], "ab");
        assert!(card.get("license").is_none());
        let licensed = croissant(&DatasetFacts { licence: Some("https://example.org/terms"), ..facts });
        assert_eq!(licensed["license"], "https://example.org/terms");
    }
}
