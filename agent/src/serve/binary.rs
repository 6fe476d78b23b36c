//! Triton's binary tensor data extension: little-endian tensors after the JSON part of a body.
//!
//! The header [`HEADER_LENGTH`] gives the bytes of the JSON part; each tensor names its own bytes in
//! `parameters.binary_data_size`, in the order of the tensors. A BYTES element is a 4-byte little-endian length and
//! that many bytes. Lengths are checked before anything is taken.

use super::error::RequestError;

/// Splits a body into its JSON part and the binary tensors that follow.
///
/// # Errors
/// [`RequestError::HeaderLength`] if the header isn't a number or exceeds the body.
pub(super) fn split<'a>(header: Option<&[u8]>, body: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), RequestError> {
    let Some(header) = header else { return Ok((body, &[])) };
    std::str::from_utf8(header)
        .ok()
        .and_then(|text| text.trim().parse::<usize>().ok())
        .and_then(|length| body.split_at_checked(length))
        .ok_or(RequestError::HeaderLength { body: body.len() })
}

/// Reads `rows` fixed-width values.
///
/// # Errors
/// [`RequestError::BinarySize`] if the bytes are not `rows × N`.
pub(super) fn fixed<const N: usize, T>(
    column: &str,
    bytes: &[u8],
    rows: usize,
    read: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>, RequestError> {
    let (values, rest) = bytes.as_chunks::<N>();
    if values.len() != rows || !rest.is_empty() {
        let expected = format!("{} ({rows} values of {N})", rows.saturating_mul(N));
        return Err(RequestError::BinarySize { column: column.to_owned(), got: bytes.len(), expected });
    }
    Ok(values.iter().map(|value| read(*value)).collect())
}

/// Reads `rows` length-prefixed UTF-8 texts.
///
/// # Errors
/// [`RequestError::BinarySize`] if a length points past the end, or there are bytes left;
/// [`RequestError::BadValue`] if an element is not UTF-8.
pub(super) fn texts<'a>(column: &str, bytes: &'a [u8], rows: usize) -> Result<Vec<&'a str>, RequestError> {
    let misfit = || RequestError::BinarySize {
        column: column.to_owned(),
        got: bytes.len(),
        expected: format!("{rows} elements of a 4-byte little-endian length and as many bytes"),
    };
    let mut found = Vec::new();
    let mut rest = bytes;
    for row in 0..rows {
        let (length, tail) = rest.split_first_chunk::<4>().ok_or_else(misfit)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| misfit())?;
        let (text, tail) = tail.split_at_checked(length).ok_or_else(misfit)?;
        let bad = |_| RequestError::BadValue { column: column.to_owned(), row, expected: "UTF-8 text" };
        found.push(std::str::from_utf8(text).map_err(bad)?);
        rest = tail;
    }
    if rest.is_empty() { Ok(found) } else { Err(misfit()) }
}

/// Appends values as little-endian FP32.
pub(super) fn put_fp32(out: &mut Vec<u8>, values: &[f32]) {
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// Appends texts, each after its length; class names are far below 4 GiB.
pub(super) fn put_texts(out: &mut Vec<u8>, texts: &[&str]) {
    for text in texts {
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(text.as_bytes());
    }
}

/// Header with the bytes of the JSON part, in requests and answers.
pub(super) const HEADER_LENGTH: &str = "inference-header-content-length";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn bodies_split_where_the_header_says() {
        assert_eq!(split(None, b"{}xyz").unwrap(), (&b"{}xyz"[..], &b""[..]));
        assert_eq!(split(Some(b"2"), b"{}xyz").unwrap(), (&b"{}"[..], &b"xyz"[..]));
        for header in ["6", "-1", "x", "", "18446744073709551616"] {
            assert_eq!(split(Some(header.as_bytes()), b"{}xyz"), Err(RequestError::HeaderLength { body: 5 }));
        }
    }

    #[test]
    fn texts_round_trip_and_lying_lengths_are_refused() {
        let mut bytes = Vec::new();
        put_texts(&mut bytes, &["", "né", "x"]);
        assert_eq!(bytes, b"\0\0\0\0\x03\0\0\0n\xc3\xa9\x01\0\0\0x");
        assert_eq!(texts("c", &bytes, 3).unwrap(), ["", "né", "x"]);
        for rows in [2, 4] {
            assert!(matches!(texts("c", &bytes, rows), Err(RequestError::BinarySize { got: 16, .. })));
        }
        assert!(matches!(texts("c", b"\xff\xff\xff\xffab", 1), Err(RequestError::BinarySize { .. })));
        let bad = RequestError::BadValue { column: "c".into(), row: 0, expected: "UTF-8 text" };
        assert_eq!(texts("c", b"\x01\0\0\0\xff", 1), Err(bad));
    }

    #[test]
    fn fixed_width_values_need_exactly_their_bytes() {
        let mut bytes = Vec::new();
        put_fp32(&mut bytes, &[1.5, -2.0]);
        assert_eq!(fixed("c", &bytes, 2, f32::from_le_bytes).unwrap(), [1.5, -2.0]);
        let error = fixed("c", &bytes, 3, f32::from_le_bytes).unwrap_err();
        assert_eq!(error.to_string(), "column \"c\": 8 bytes of binary data, expected 12 (3 values of 4)");
        assert!(fixed("c", &bytes[..7], 2, f32::from_le_bytes).is_err());
    }
}
