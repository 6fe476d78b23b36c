//! Open Inference Protocol v2: the JSON shapes of requests and answers, and nothing else.
//!
//! Reading is bounded: a tensor's data is flattened while it is parsed and stops at [`MAX_BATCH_ROWS`] values, and
//! parameters are scalars. Fields the protocol doesn't name are skipped, as other servers do. Whether names, shapes
//! and datatypes fit the contract is decided in `tensor`.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeSeed, Error as _, SeqAccess, Visitor},
};

use super::{
    MAX_BATCH_ROWS,
    error::{RequestError, shorten},
};

/// A tensor datatype that table columns use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Datatype {
    /// True or false; one byte, 0 or 1, in binary.
    Bool,
    /// 32-bit signed integer.
    Int32,
    /// 64-bit signed integer.
    Int64,
    /// 32-bit float; `NaN` or null is missing.
    Fp32,
    /// 64-bit float; `NaN` or null is missing.
    Fp64,
    /// UTF-8 text; null, or the text named by `parameters.null_value`, is missing.
    Bytes,
}

impl Datatype {
    /// All datatypes, in declaration order.
    pub const ALL: [Self; 6] = [Self::Bool, Self::Int32, Self::Int64, Self::Fp32, Self::Fp64, Self::Bytes];

    /// The protocol's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// The datatype of a protocol name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|datatype| datatype.as_str() == name)
    }
}

/// A JSON scalar: a cell of a tensor or the value of a parameter.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Scalar {
    /// null.
    Null,
    /// true or false.
    Bool(bool),
    /// A whole number that fits 64 bits.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// A string.
    Text(String),
}

/// Parameters of a request, a tensor or an answer.
pub type Parameters = BTreeMap<String, Scalar>;

/// Body of `POST /v2/models/{model}/infer`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InferRequest {
    /// Chosen by the caller, echoed and logged; should be opaque.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Request parameters; `binary_data_output` asks for binary outputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
    /// One tensor a column.
    pub inputs: Vec<InputTensor>,
    /// Outputs asked for; none or empty means all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs: Option<Vec<RequestedOutput>>,
}

/// One input tensor: one column of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InputTensor {
    /// The contract's column name.
    pub name: String,
    /// `[n]` or `[n,1]`.
    pub shape: Vec<u64>,
    /// A [`Datatype`]'s name.
    pub datatype: String,
    /// `null_value`, `binary_data_size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
    /// The values, unless they follow the JSON in binary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<TensorData>,
}

/// An output the caller asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestedOutput {
    /// `probabilities` or `labels`.
    pub name: String,
    /// `binary_data`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
}

/// Values of a tensor, flat or as one-element rows.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorData {
    /// The values in row order.
    pub cells: Vec<Scalar>,
    /// Whether each value was wrapped in an array of its own, as shape `[n,1]` may be.
    pub nested: bool,
}

/// Answer to `POST /v2/models/{model}/infer`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InferResponse<'a> {
    /// The model asked.
    pub model_name: &'a str,
    /// Digest of the version that answered.
    pub model_version: &'a str,
    /// The request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<&'a str>,
    /// `model_age_s`, and `stale_coordinator` with `coordinator_contact_age_s` where there is a coordinator.
    pub parameters: Parameters,
    /// The outputs asked for.
    pub outputs: Vec<OutputTensor<'a>>,
}

/// One output tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OutputTensor<'a> {
    /// `probabilities` or `labels`.
    pub name: &'static str,
    /// `[n,k]` or `[n]`.
    pub shape: Vec<usize>,
    /// FP32 or BYTES.
    pub datatype: Datatype,
    /// `binary_data_size` where the values follow the JSON.
    #[serde(skip_serializing_if = "Parameters::is_empty")]
    pub parameters: Parameters,
    /// The values, row-major, unless they follow the JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<OutputData<'a>>,
}

/// Values of an output tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum OutputData<'a> {
    /// Class probabilities.
    Fp32(Vec<f32>),
    /// Class names.
    Bytes(Vec<&'a str>),
}

/// Answer to `GET /v2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerMetadata {
    /// The server's name.
    pub name: &'static str,
    /// The server's version.
    pub version: &'static str,
    /// Protocol extensions understood.
    pub extensions: Vec<&'static str>,
}

/// Answer to the server's health questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Whether a version is in service; absent from the liveness answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// Whether the process answers.
    pub live: bool,
}

/// Answer to `GET /v2/models`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelList<'a> {
    /// Names of the models served.
    pub models: Vec<&'a str>,
}

/// Answer to `GET /v2/models/{model}/ready`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelReady<'a> {
    /// The model.
    pub name: &'a str,
    /// Whether a version is in service.
    pub ready: bool,
}

/// Answer to `GET /v2/models/{model}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelMetadata<'a> {
    /// The model.
    pub name: &'a str,
    /// The digest in service, if any.
    pub versions: Vec<String>,
    /// What runs it.
    pub platform: &'static str,
    /// One tensor a column of the contract.
    pub inputs: Vec<TensorMetadata>,
    /// The outputs.
    pub outputs: Vec<TensorMetadata>,
    /// Where the version in service comes from, in text.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<&'static str, String>,
}

/// Shape and type of one tensor; -1 in the shape is any number of rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorMetadata {
    /// The tensor's name.
    pub name: String,
    /// Its datatype.
    pub datatype: Datatype,
    /// Its shape.
    pub shape: Vec<i64>,
}

/// Every refusal's body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorBody {
    /// What was refused and what was expected.
    pub error: String,
}

impl InferRequest {
    /// Reads a request. Python's bare `NaN`, which is not JSON, is read as null.
    ///
    /// # Errors
    /// [`RequestError::BadJson`] if it isn't JSON of this shape or a tensor has more than [`MAX_BATCH_ROWS`] values;
    /// [`RequestError::BadId`] for an id that can't be logged as it is.
    pub fn parse(json: &[u8]) -> Result<Self, RequestError> {
        let request: Self = serde_json::from_slice(&nan_as_null(json))
            .map_err(|e| RequestError::BadJson { detail: shorten(&e.to_string()) })?;
        let id = request.id.as_deref().unwrap_or_default();
        if id.len() > MAX_ID_BYTES || id.chars().any(char::is_control) {
            return Err(RequestError::BadId { got: id.len(), limit: MAX_ID_BYTES });
        }
        Ok(request)
    }
}

/// Replaces `NaN` outside strings by `null`, copying only if there is one.
fn nan_as_null(json: &[u8]) -> Cow<'_, [u8]> {
    if !json.windows(3).any(|w| w == b"NaN") {
        return Cow::Borrowed(json);
    }
    let mut out = Vec::with_capacity(json.len() + json.len() / 3);
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = json;
    while let Some((&byte, tail)) = rest.split_first() {
        if !in_string && rest.starts_with(b"NaN") {
            out.extend_from_slice(b"null");
            rest = rest.get(3..).unwrap_or_default();
            continue;
        }
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ => {}
        }
        out.push(byte);
        rest = tail;
    }
    Cow::Owned(out)
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

struct ScalarVisitor;

impl<'de> Visitor<'de> for ScalarVisitor {
    type Value = Scalar;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, a string, true, false or null")
    }

    fn visit_unit<E>(self) -> Result<Scalar, E> {
        Ok(Scalar::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
        Ok(Scalar::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
        Ok(Scalar::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
        // Beyond i64 only the magnitude can matter, and ranges clamp it.
        Ok(i64::try_from(value).map_or(Scalar::Float(value as f64), Scalar::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Scalar, E> {
        Ok(Scalar::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
        Ok(Scalar::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Scalar, E> {
        Ok(Scalar::Text(value))
    }
}

impl Serialize for TensorData {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.nested {
            serializer.collect_seq(self.cells.iter().map(|cell| [cell]))
        } else {
            serializer.collect_seq(&self.cells)
        }
    }
}

impl<'de> Deserialize<'de> for TensorData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(DataVisitor)
    }
}

struct DataVisitor;

impl<'de> Visitor<'de> for DataVisitor {
    type Value = TensorData;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of values or of one-value arrays")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<TensorData, A::Error> {
        let mut cells = Vec::new();
        let mut wrapped = 0;
        while seq.next_element_seed(RowSeed { cells: &mut cells, wrapped: &mut wrapped })?.is_some() {
            if cells.len() > MAX_BATCH_ROWS {
                return Err(A::Error::custom(format_args!("a tensor has more than {MAX_BATCH_ROWS} values")));
            }
        }
        if wrapped != 0 && wrapped != cells.len() {
            return Err(A::Error::custom("data mixes values and arrays"));
        }
        Ok(TensorData { nested: wrapped != 0, cells })
    }
}

/// Reads one element of `data`: a scalar, or an array that holds exactly one.
struct RowSeed<'a> {
    cells: &'a mut Vec<Scalar>,
    wrapped: &'a mut usize,
}

impl<'de> DeserializeSeed<'de> for RowSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for RowSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value or an array of one value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.cells.push(Scalar::Null);
        Ok(())
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.cells.push(Scalar::Bool(value));
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.cells.push(Scalar::Int(value));
        Ok(())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.cells.push(ScalarVisitor.visit_u64(value)?);
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.cells.push(Scalar::Float(value));
        Ok(())
    }

    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        self.cells.push(Scalar::Text(value.to_owned()));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let value = seq
            .next_element()?
            .ok_or_else(|| A::Error::custom("an inner array is empty, expected 1 value"))?;
        if seq.next_element::<Scalar>()?.is_some() {
            return Err(A::Error::custom("an inner array has more than 1 value, send one tensor a column"));
        }
        self.cells.push(value);
        *self.wrapped += 1;
        Ok(())
    }
}

/// Longest request id, bytes.
pub const MAX_ID_BYTES: usize = 128;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn with_data(data: &str) -> String {
        format!(r#"{{"inputs":[{{"name":"a","shape":[1],"datatype":"FP64","data":{data}}}]}}"#)
    }

    fn data_of(data: &str) -> Result<TensorData, RequestError> {
        let request = InferRequest::parse(with_data(data).as_bytes())?;
        Ok(request.inputs.into_iter().next().unwrap().data.unwrap())
    }

    #[test]
    fn data_is_flattened_and_remembers_its_nesting() {
        let flat = data_of(r#"[1, 2.5, "x", null, true]"#).unwrap();
        let expected =
            [Scalar::Int(1), Scalar::Float(2.5), Scalar::Text("x".into()), Scalar::Null, Scalar::Bool(true)];
        assert_eq!(flat, TensorData { cells: expected.to_vec(), nested: false });
        let nested = data_of(r#"[[1], [2.5], ["x"], [null], [true]]"#).unwrap();
        assert_eq!(nested, TensorData { cells: expected.to_vec(), nested: true });
    }

    #[test]
    fn ragged_deep_and_mixed_data_is_refused() {
        for (data, says) in [
            ("[[1,2]]", "an inner array has more than 1 value"),
            ("[[]]", "an inner array is empty"),
            ("[1,[2]]", "data mixes values and arrays"),
            ("[[[1]]]", "invalid type: sequence"),
            ("[{}]", "invalid type: map"),
            ("3", "invalid type: integer"),
        ] {
            let RequestError::BadJson { detail } = data_of(data).unwrap_err() else { panic!("{data}") };
            assert!(detail.contains(says), "{data}: {detail}");
        }
    }

    #[test]
    fn a_tensor_stops_at_the_limit_while_it_is_read() {
        let of = |n: usize| data_of(&format!("[{}0]", "0,".repeat(n - 1)));
        assert_eq!(of(MAX_BATCH_ROWS).unwrap().cells.len(), MAX_BATCH_ROWS);
        let RequestError::BadJson { detail } = of(MAX_BATCH_ROWS + 1).unwrap_err() else { panic!() };
        assert!(detail.contains("more than 65536 values"), "{detail}");
    }

    #[test]
    fn bare_nan_is_null_but_not_inside_strings() {
        let data = data_of(r#"[NaN, 1.0, "NaN", "a\"NaN", NaN]"#).unwrap();
        let text = |s: &str| Scalar::Text(s.into());
        assert_eq!(data.cells, [Scalar::Null, Scalar::Float(1.0), text("NaN"), text("a\"NaN"), Scalar::Null]);
    }

    #[test]
    fn nested_parameters_are_refused_and_unknown_fields_skipped() {
        let bad = br#"{"parameters":{"a":[1]},"inputs":[]}"#;
        let RequestError::BadJson { detail } = InferRequest::parse(bad).unwrap_err() else { panic!() };
        assert!(detail.contains("expected a number, a string, true, false or null"), "{detail}");
        let request = InferRequest::parse(br#"{"surplus":{"deep":[1]},"id":null,"inputs":[]}"#).unwrap();
        assert_eq!(request, InferRequest { id: None, parameters: None, inputs: vec![], outputs: None });
    }

    #[test]
    fn ids_are_bounded_and_printable() {
        let parse = |id: &str| InferRequest::parse(format!(r#"{{"id":"{id}","inputs":[]}}"#).as_bytes());
        assert_eq!(parse(&"x".repeat(MAX_ID_BYTES)).unwrap().id.unwrap().len(), MAX_ID_BYTES);
        let long = parse(&"x".repeat(MAX_ID_BYTES + 1)).unwrap_err();
        assert_eq!(long, RequestError::BadId { got: MAX_ID_BYTES + 1, limit: MAX_ID_BYTES });
        assert_eq!(parse(r"a\nb").unwrap_err(), RequestError::BadId { got: 3, limit: MAX_ID_BYTES });
    }

    #[test]
    fn a_request_survives_the_way_out_and_back() {
        let text = r#"{"id":"7","parameters":{"binary_data_output":false},"inputs":[{"name":"a","shape":[2,1],"datatype":"BYTES","parameters":{"null_value":"NA"},"data":[["x"],["NA"]]}],"outputs":[{"name":"labels"}]}"#;
        let request = InferRequest::parse(text.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
    }

    #[test]
    fn datatype_names_are_the_protocols() {
        for datatype in Datatype::ALL {
            assert_eq!(Datatype::parse(datatype.as_str()), Some(datatype));
            assert_eq!(serde_json::to_string(&datatype).unwrap(), format!("{:?}", datatype.as_str()));
        }
        assert_eq!(Datatype::parse("UINT8"), None);
    }
}
