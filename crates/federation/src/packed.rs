//! Vectors of floats in documents: base64 of their little-endian bytes, exact and a tenth of the work of decimal digits.
//!
//! For `#[serde(with = "packed")]`. A document of 131,072 values is read and checked by every agent of a round, so
//! its size and its parsing are most of what a round costs beside the updates themselves.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

/// A float with a fixed little-endian form.
pub trait Float: Copy {
    /// Appends its bytes.
    fn push_to(self, bytes: &mut Vec<u8>);
    /// Reads all values of `bytes`; nothing if their number is no multiple of the value's size.
    fn read_all(bytes: &[u8]) -> Option<Vec<Self>>;
}

impl Float for f32 {
    fn push_to(self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.to_le_bytes());
    }

    fn read_all(bytes: &[u8]) -> Option<Vec<Self>> {
        let (values, rest) = bytes.as_chunks();
        rest.is_empty().then(|| values.iter().map(|value| Self::from_le_bytes(*value)).collect())
    }
}

impl Float for f64 {
    fn push_to(self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.to_le_bytes());
    }

    fn read_all(bytes: &[u8]) -> Option<Vec<Self>> {
        let (values, rest) = bytes.as_chunks();
        rest.is_empty().then(|| values.iter().map(|value| Self::from_le_bytes(*value)).collect())
    }
}

/// Writes the values as one string.
///
/// # Errors
/// The serialiser's.
pub fn serialize<S: Serializer, F: Float>(values: &[F], serializer: S) -> Result<S::Ok, S::Error> {
    let mut bytes = Vec::with_capacity(size_of_val(values));
    values.iter().for_each(|value| value.push_to(&mut bytes));
    serializer.serialize_str(&STANDARD.encode(bytes))
}

/// Reads the values of one string.
///
/// # Errors
/// Not base64 (RFC 4648, section 4), or not whole values.
pub fn deserialize<'de, D: Deserializer<'de>, F: Float>(deserializer: D) -> Result<Vec<F>, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    let bytes = STANDARD.decode(text.as_bytes()).map_err(D::Error::custom)?;
    let size = size_of::<F>();
    F::read_all(&bytes).ok_or_else(|| {
        D::Error::custom(format!("expected values of {size} bytes, got {} bytes", bytes.len()))
    })
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Document {
        #[serde(with = "super")]
        values: Vec<f32>,
        #[serde(with = "super")]
        wide: Vec<f64>,
    }

    #[test]
    fn every_bit_comes_back() {
        let document = Document {
            values: vec![0.0, -0.0, 1.5, f32::MIN_POSITIVE / 2.0, f32::MAX],
            wide: vec![1.0 / 3.0, -f64::MAX],
        };
        let text = serde_json::to_string(&document).unwrap();
        let back: Document = serde_json::from_str(&text).unwrap();
        let bits = |d: &Document| {
            let values: Vec<u32> = d.values.iter().map(|v| v.to_bits()).collect();
            (values, d.wide.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(bits(&back), bits(&document));
    }

    #[test]
    fn one_is_spelt_as_rfc_4648_and_ieee_754_say() {
        // 1.0 is 3f800000 in IEEE 754 binary32; the bytes 00 00 80 3f are AACAPw== in base64.
        let document = Document { values: vec![1.0], wide: Vec::new() };
        assert_eq!(serde_json::to_string(&document).unwrap(), r#"{"values":"AACAPw==","wide":""}"#);
    }

    #[test]
    fn other_text_and_broken_values_are_refused() {
        for bad in [r#""AACA""#, r#""*""#, r#""AACAPw""#, "[1.0]", "null"] {
            let text = format!(r#"{{"values":{bad},"wide":""}}"#);
            assert!(serde_json::from_str::<Document>(&text).is_err(), "{bad}");
        }
    }
}
