//! Why a request is refused: one variant a condition, its HTTP status, and the text the caller reads.
//!
//! Texts name columns, sizes and positions and never repeat a cell's value. What failed inside the model or the log
//! stays in the agent's own log; the caller sees only that it failed.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use thiserror::Error;

use super::{oip::ErrorBody, rest};

/// A refused request.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// No route has this path.
    #[error("no such path, see GET /v2")]
    UnknownPath,
    /// The path exists with another verb.
    #[error("method not allowed on this path")]
    Method,
    /// The path is not valid UTF-8 after decoding.
    #[error("path is not valid percent-encoded UTF-8")]
    BadPath,
    /// The model's name isn't the one served.
    #[error("unknown model {got:?}, expected {served:?}")]
    UnknownModel {
        /// Name in the path, shortened.
        got: String,
        /// Name served here.
        served: String,
    },
    /// The version isn't the one in service.
    #[error("unknown version {got:?} of model {model:?}, in service: {served}")]
    UnknownVersion {
        /// Version in the path, shortened.
        got: String,
        /// The model.
        model: String,
        /// Digest in service, or "none".
        served: String,
    },
    /// No version has been promoted yet.
    #[error("model {model:?} has no promoted version yet, retry later")]
    NotReady {
        /// The model.
        model: String,
    },
    /// As many requests run and wait as are allowed.
    #[error("too many requests at once, retry later")]
    Overloaded,
    /// The version changed during each of the attempts.
    #[error("the model was being replaced, retry later")]
    Replaced,
    /// The caller's identity is not on the allow list, or there is none in the certificate.
    #[error("caller is not on this endpoint's allow list")]
    Forbidden,
    /// A loopback request that names another host, as a web page behind a rebound DNS name would.
    #[error("host {got:?} is not a loopback name, use localhost, 127.0.0.1 or [::1]")]
    ForeignHost {
        /// The Host header, shortened.
        got: String,
    },
    /// The body is larger than allowed.
    #[error("request body exceeds {limit} bytes, send fewer rows a request")]
    BodyTooLarge {
        /// Most bytes.
        limit: usize,
    },
    /// The body didn't arrive in time.
    #[error("request body did not arrive within {limit_s} s")]
    BodyTimeout {
        /// Most seconds.
        limit_s: u64,
    },
    /// The body broke off.
    #[error("request body could not be read")]
    BodyBroken,
    /// The body is compressed.
    #[error("content-encoding {got:?} is not supported, send the body as it is")]
    Encoding {
        /// The header, shortened.
        got: String,
    },
    /// `Inference-Header-Content-Length` is not a number or exceeds the body.
    #[error("inference-header-content-length must be an integer from 0 to the body's {body} bytes")]
    HeaderLength {
        /// Bytes of the body.
        body: usize,
    },
    /// The JSON is not an inference request.
    #[error("not an inference request: {detail}")]
    BadJson {
        /// The parser's words, shortened.
        detail: String,
    },
    /// The request id is too long or has control characters.
    #[error("id must be at most {limit} bytes without control characters, got {got} bytes")]
    BadId {
        /// Bytes of the id.
        got: usize,
        /// Most bytes.
        limit: usize,
    },
    /// A tensor's name is not a column of the contract.
    #[error("unknown column {got:?}, expected: {expected}")]
    UnknownColumn {
        /// The tensor's name, shortened.
        got: String,
        /// The contract's columns.
        expected: String,
    },
    /// Two tensors have one name.
    #[error("column {column:?} is sent twice")]
    DuplicateColumn {
        /// The column.
        column: String,
    },
    /// Columns of the contract have no tensor.
    #[error("missing column: {missing}; expected: {expected}")]
    MissingColumn {
        /// Columns without a tensor.
        missing: String,
        /// The contract's columns.
        expected: String,
    },
    /// A tensor's datatype doesn't fit its column.
    #[error("column {column:?}: datatype {got:?} doesn't fit, expected {expected}")]
    WrongDatatype {
        /// The column.
        column: String,
        /// Datatype sent, shortened.
        got: String,
        /// Datatypes that fit.
        expected: String,
    },
    /// A tensor is not one value a row.
    #[error("column {column:?}: shape {got} doesn't fit, expected [n] or [n,1]")]
    WrongShape {
        /// The column.
        column: String,
        /// Shape sent, shortened.
        got: String,
    },
    /// The request has no row.
    #[error("column {column:?}: shape names 0 rows, expected at least 1")]
    NoRows {
        /// The column.
        column: String,
    },
    /// The request has more rows than allowed.
    #[error("column {column:?}: {got} rows exceed the limit of {limit} a request")]
    TooManyRows {
        /// The column.
        column: String,
        /// Rows sent.
        got: u64,
        /// Most rows.
        limit: usize,
    },
    /// Two tensors disagree on the number of rows.
    #[error("column {column:?} has {got} rows, expected {expected} as in column {first:?}")]
    RowsDiffer {
        /// The column.
        column: String,
        /// Its rows.
        got: usize,
        /// The first column.
        first: String,
        /// The first column's rows.
        expected: usize,
    },
    /// The data is not as long as the shape says.
    #[error("column {column:?}: data has {got} values, expected {expected} as its shape says")]
    DataLength {
        /// The column.
        column: String,
        /// Values sent.
        got: usize,
        /// Values the shape names.
        expected: usize,
    },
    /// A tensor has neither `data` nor `binary_data_size`, or both.
    #[error("column {column:?}: expected either data or parameters.binary_data_size, got {got}")]
    DataMissing {
        /// The column.
        column: String,
        /// "both" or "neither".
        got: &'static str,
    },
    /// A value isn't what the tensor's datatype says.
    #[error("column {column:?}, row {row}: expected {expected}")]
    BadValue {
        /// The column.
        column: String,
        /// Row, counted from 0.
        row: usize,
        /// What fits.
        expected: &'static str,
    },
    /// Binary data is not as long as it should be.
    #[error("column {column:?}: {got} bytes of binary data, expected {expected}")]
    BinarySize {
        /// The column.
        column: String,
        /// Bytes there are.
        got: usize,
        /// Bytes expected, in words.
        expected: String,
    },
    /// Bytes are left after the last binary tensor.
    #[error("{got} bytes follow the last binary tensor, expected 0")]
    BinaryTrailing {
        /// Bytes left.
        got: usize,
    },
    /// A parameter has a value that can't be used.
    #[error("{at}: parameter {name} must be {expected}")]
    BadParameter {
        /// Where: the request, a column or an output.
        at: String,
        /// The parameter.
        name: &'static str,
        /// What fits.
        expected: &'static str,
    },
    /// A requested output doesn't exist.
    #[error("unknown output {got:?}, expected: probabilities, labels")]
    UnknownOutput {
        /// The output's name, shortened.
        got: String,
    },
    /// The model failed; the reason is in the agent's log.
    #[error("prediction failed, see the agent's log")]
    Failed,
    /// The prediction could not be logged, so it is not given.
    #[error("prediction log is not writable, no answer without a record")]
    LogUnavailable,
}

impl RequestError {
    /// The HTTP status of the refusal.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::UnknownPath | Self::UnknownModel { .. } | Self::UnknownVersion { .. } => {
                StatusCode::NOT_FOUND
            }
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotReady { .. } | Self::Overloaded | Self::Replaced | Self::LogUnavailable => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Forbidden | Self::ForeignHost { .. } => StatusCode::FORBIDDEN,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Encoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        let status = self.status();
        let mut response = rest::json(status, &ErrorBody { error: self.to_string() });
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_S));
        }
        response
    }
}

/// Cuts text from outside to [`MAX_ECHO_BYTES`] before it enters a message.
pub(super) fn shorten(text: &str) -> String {
    let mut end = text.len().min(MAX_ECHO_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

/// Lists names for a message, the first [`MAX_NAMES`] of them.
pub(super) fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().collect();
    let mut text = names.iter().take(MAX_NAMES).copied().collect::<Vec<_>>().join(", ");
    if names.len() > MAX_NAMES {
        text.push_str(&format!(" and {} more", names.len() - MAX_NAMES));
    }
    text
}

/// Seconds a caller is asked to wait after 503.
const RETRY_AFTER_S: &str = "1";
/// Longest piece of a request that a message repeats, bytes.
const MAX_ECHO_BYTES: usize = 120;
/// Most column names in a message.
const MAX_NAMES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echoed_text_is_cut_at_a_character_boundary() {
        assert_eq!(shorten(&"x".repeat(MAX_ECHO_BYTES)).len(), MAX_ECHO_BYTES);
        assert_eq!(shorten(&"x".repeat(MAX_ECHO_BYTES + 1)).len(), MAX_ECHO_BYTES);
        // 'é' is two bytes; the cut falls into the 60th of them when one byte precedes.
        assert_eq!(shorten(&format!("x{}", "é".repeat(80))).len(), MAX_ECHO_BYTES - 1);
    }

    #[test]
    fn long_name_lists_say_how_many_are_left_out() {
        let names: Vec<String> = (0..MAX_NAMES + 1).map(|i| format!("c{i}")).collect();
        assert!(list(names.iter().map(String::as_str)).ends_with("c63 and 1 more"));
        assert!(list(names.iter().take(MAX_NAMES).map(String::as_str)).ends_with(", c63"));
    }

    #[test]
    fn every_503_asks_to_retry() {
        for error in [RequestError::Overloaded, RequestError::Replaced, RequestError::LogUnavailable] {
            let response = error.into_response();
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(response.headers().get(header::RETRY_AFTER), Some(&HeaderValue::from_static("1")));
        }
        assert!(RequestError::Failed.into_response().headers().get(header::RETRY_AFTER).is_none());
    }
}
