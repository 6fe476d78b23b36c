//! Tensors into a typed batch: parse, don't validate.
//!
//! [`InputLayout`] knows the contract's columns; [`InputLayout::batch`] turns a request into rows in the contract's
//! terms or names the first thing that doesn't fit. It refuses unknown, missing and repeated columns, datatypes and
//! shapes that don't fit, and infinities. It does not clamp: declared ranges are applied where the model reads the
//! batch. A text that is no declared level becomes "other".

use std::collections::{BTreeMap, BTreeSet};

use tabmesh_contract::{
    batch::{TypedBatch, TypedColumn, missing_code, other_code},
    schema::{FeatureKind, FeatureSchema},
};

use super::{
    InputColumn, ServeError, binary,
    error::{RequestError, list, shorten},
    oip::{Datatype, InputTensor, Scalar, TensorMetadata},
};

/// The columns a request must carry, and where each goes.
#[derive(Debug)]
pub(super) struct InputLayout {
    /// In the contract's order, as advertised.
    columns: Vec<Column>,
    /// Position in `columns` by name.
    positions: BTreeMap<String, usize>,
    /// Kinds of all features of the schema; those no column names stay missing.
    kinds: Vec<FeatureKind>,
}

#[derive(Debug)]
struct Column {
    name: String,
    feature: usize,
    datatype: Datatype,
    values: Values,
}

/// What a column's values become.
#[derive(Debug)]
enum Values {
    Numeric,
    /// Level codes by text.
    Levels(BTreeMap<String, u32>),
}

impl InputLayout {
    /// Checks the predictor's columns against its schema.
    ///
    /// # Errors
    /// [`ServeError::Layout`] for a name or a feature used twice, a feature that doesn't exist or differs from the
    /// schema's, or a datatype that can't carry the kind.
    pub(super) fn new(schema: &FeatureSchema, columns: Vec<InputColumn>) -> Result<Self, ServeError> {
        let mut positions = BTreeMap::new();
        let mut features = BTreeSet::new();
        let mut parsed = Vec::new();
        for (position, column) in columns.into_iter().enumerate() {
            let refuse =
                |reason: &str| ServeError::Layout { column: column.name.clone(), reason: reason.into() };
            let feature = schema.features().get(column.feature).ok_or_else(|| refuse("no such feature"))?;
            if feature.kind != column.kind {
                return Err(refuse("its kind differs from the feature's"));
            }
            if column.name.is_empty() || positions.insert(column.name.clone(), position).is_some() {
                return Err(refuse("its name is empty or used twice"));
            }
            if !features.insert(column.feature) {
                return Err(refuse("its feature has another column"));
            }
            let values = match &column.kind {
                FeatureKind::Numeric(_) if column.datatype == Datatype::Bytes => {
                    return Err(refuse("a numeric feature can't be BYTES"));
                }
                FeatureKind::Numeric(_) => Values::Numeric,
                FeatureKind::Categorical { .. }
                    if matches!(column.datatype, Datatype::Fp32 | Datatype::Fp64) =>
                {
                    return Err(refuse("a categorical feature can't be a float"));
                }
                FeatureKind::Categorical { levels } => {
                    Values::Levels(levels.iter().cloned().zip(0u32..).collect())
                }
            };
            let InputColumn { name, feature, datatype, .. } = column;
            parsed.push(Column { name, feature, datatype, values });
        }
        if parsed.is_empty() {
            return Err(ServeError::Layout {
                column: String::new(),
                reason: "there is no input column".into(),
            });
        }
        let kinds = schema.features().iter().map(|feature| feature.kind.clone()).collect();
        Ok(Self { columns: parsed, positions, kinds })
    }

    /// The columns as the model's metadata lists them.
    pub(super) fn metadata(&self) -> Vec<TensorMetadata> {
        self.columns
            .iter()
            .map(|c| TensorMetadata { name: c.name.clone(), datatype: c.datatype, shape: vec![-1] })
            .collect()
    }

    /// Parses a request's tensors; `tail` is what follows the JSON part of the body.
    ///
    /// # Errors
    /// The first [`RequestError`] in this order: names, binary sizes, then tensor by tensor datatype, shape, number of
    /// rows, parameters, data length, values.
    pub(super) fn batch(
        &self,
        inputs: &[InputTensor],
        tail: &[u8],
        max_rows: usize,
    ) -> Result<TypedBatch, RequestError> {
        let tensors = split_data(self.match_names(inputs)?, tail)?;
        let mut columns: Vec<Option<TypedColumn>> = self.kinds.iter().map(|_| None).collect();
        let mut first: Option<(&str, usize)> = None;
        for (column, tensor, data) in tensors {
            let datatype = column.accept(&tensor.datatype)?;
            let rows = rows_of(tensor, max_rows)?;
            let (name, expected) = *first.get_or_insert((&column.name, rows));
            if rows != expected {
                let (column, first) = (column.name.clone(), name.to_owned());
                return Err(RequestError::RowsDiffer { column, got: rows, first, expected });
            }
            let values = column.parse(tensor, datatype, data, rows)?;
            if let Some(slot) = columns.get_mut(column.feature) {
                *slot = Some(values);
            }
        }
        let rows = first.map_or(0, |(_, rows)| rows);
        let fill = |(column, kind): (Option<TypedColumn>, &FeatureKind)| {
            column.unwrap_or_else(|| TypedColumn::missing(kind, rows))
        };
        Ok(TypedBatch {
            columns: columns.into_iter().zip(&self.kinds).map(fill).collect(),
            labels: vec![None; rows],
            units: vec![[0; 16]; rows],
        })
    }

    /// Finds each tensor's column; every column must have exactly one.
    fn match_names<'a>(
        &'a self,
        inputs: &'a [InputTensor],
    ) -> Result<Vec<(&'a Column, &'a InputTensor)>, RequestError> {
        let expected = || list(self.columns.iter().map(|c| c.name.as_str()));
        let mut seen = BTreeSet::new();
        let mut matched = Vec::new();
        for tensor in inputs {
            let column = self.positions.get(&tensor.name).and_then(|&position| self.columns.get(position));
            let unknown = || RequestError::UnknownColumn { got: shorten(&tensor.name), expected: expected() };
            let column = column.ok_or_else(unknown)?;
            if !seen.insert(column.name.as_str()) {
                return Err(RequestError::DuplicateColumn { column: column.name.clone() });
            }
            matched.push((column, tensor));
        }
        let missing: Vec<_> =
            self.columns.iter().map(|c| c.name.as_str()).filter(|n| !seen.contains(n)).collect();
        if missing.is_empty() {
            Ok(matched)
        } else {
            Err(RequestError::MissingColumn { missing: list(missing), expected: expected() })
        }
    }
}

/// Where a tensor's values stand.
enum Data<'a> {
    Json { cells: &'a [Scalar], nested: bool },
    Binary(&'a [u8]),
}

/// Gives each tensor its JSON values or its piece of the binary tail.
fn split_data<'a>(
    tensors: Vec<(&'a Column, &'a InputTensor)>,
    tail: &'a [u8],
) -> Result<Vec<(&'a Column, &'a InputTensor, Data<'a>)>, RequestError> {
    let mut rest = tail;
    let mut split = Vec::new();
    for (column, tensor) in tensors {
        let size = tensor.parameters.as_ref().and_then(|p| p.get(BINARY_SIZE));
        let data = match (&tensor.data, size) {
            (Some(data), None) => Data::Json { cells: &data.cells, nested: data.nested },
            (None, Some(size)) => {
                let (piece, after) = take(column, size, rest)?;
                rest = after;
                Data::Binary(piece)
            }
            (Some(_), Some(_)) => {
                return Err(RequestError::DataMissing { column: column.name.clone(), got: "both" });
            }
            (None, None) => {
                return Err(RequestError::DataMissing { column: column.name.clone(), got: "neither" });
            }
        };
        split.push((column, tensor, data));
    }
    if rest.is_empty() { Ok(split) } else { Err(RequestError::BinaryTrailing { got: rest.len() }) }
}

fn take<'a>(column: &Column, size: &Scalar, rest: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), RequestError> {
    let size = match size {
        Scalar::Int(size) => usize::try_from(*size).ok(),
        _ => None,
    };
    let size = size.ok_or_else(|| column.bad_parameter(BINARY_SIZE, "an integer of at least 0"))?;
    rest.split_at_checked(size).ok_or_else(|| RequestError::BinarySize {
        column: column.name.clone(),
        got: rest.len(),
        expected: format!("{size} as binary_data_size says"),
    })
}

fn rows_of(tensor: &InputTensor, max_rows: usize) -> Result<usize, RequestError> {
    let column = || tensor.name.clone();
    let rows = match tensor.shape.as_slice() {
        [rows] | [rows, 1] => *rows,
        _ => {
            return Err(RequestError::WrongShape {
                column: column(),
                got: shorten(&format!("{:?}", tensor.shape)),
            });
        }
    };
    match usize::try_from(rows) {
        Ok(0) => Err(RequestError::NoRows { column: column() }),
        Ok(rows) if rows <= max_rows => Ok(rows),
        _ => Err(RequestError::TooManyRows { column: column(), got: rows, limit: max_rows }),
    }
}

impl Column {
    /// Datatypes this column takes: its own, and those that say the same without loss.
    fn accepted(&self) -> Vec<Datatype> {
        let mut accepted = match (&self.values, self.datatype) {
            (Values::Numeric, _) => vec![Datatype::Fp64, Datatype::Fp32, Datatype::Int64, Datatype::Int32],
            (Values::Levels(_), Datatype::Int32 | Datatype::Int64) => {
                vec![Datatype::Bytes, Datatype::Int64, Datatype::Int32]
            }
            (Values::Levels(_), _) => vec![Datatype::Bytes],
        };
        if self.datatype == Datatype::Bool {
            accepted.push(Datatype::Bool);
        }
        accepted
    }

    fn accept(&self, name: &str) -> Result<Datatype, RequestError> {
        let accepted = self.accepted();
        Datatype::parse(name).filter(|datatype| accepted.contains(datatype)).ok_or_else(|| {
            RequestError::WrongDatatype {
                column: self.name.clone(),
                got: shorten(name),
                expected: accepted.iter().map(|datatype| datatype.as_str()).collect::<Vec<_>>().join(" or "),
            }
        })
    }

    fn parse(
        &self,
        tensor: &InputTensor,
        datatype: Datatype,
        data: Data<'_>,
        rows: usize,
    ) -> Result<TypedColumn, RequestError> {
        let null = self.null_value(tensor, datatype)?;
        if let Data::Json { cells, nested } = &data {
            if *nested && tensor.shape.len() != 2 {
                let got = format!("{:?} with nested data", tensor.shape);
                return Err(RequestError::WrongShape { column: self.name.clone(), got });
            }
            if cells.len() != rows {
                return Err(RequestError::DataLength {
                    column: self.name.clone(),
                    got: cells.len(),
                    expected: rows,
                });
            }
        }
        match &self.values {
            Values::Numeric => self.numbers(datatype, data, rows).map(TypedColumn::Numeric),
            Values::Levels(codes) => {
                let level = |text: &str| codes.get(text).copied().unwrap_or_else(|| other_code(codes.len()));
                let code = |value: Option<&str>| match value {
                    Some(text) if null != Some(text) => level(text),
                    _ => missing_code(codes.len()),
                };
                self.codes(datatype, data, rows, code).map(TypedColumn::Categorical)
            }
        }
    }

    /// The text that stands for a missing value, if the tensor names one.
    fn null_value<'a>(
        &self,
        tensor: &'a InputTensor,
        datatype: Datatype,
    ) -> Result<Option<&'a str>, RequestError> {
        let parameters = tensor.parameters.as_ref();
        let find = |name| parameters.and_then(|p| p.get(name));
        if find("content_type") == Some(&Scalar::Text("base64".into())) {
            return Err(self.bad_parameter("content_type", "other than base64: send text, or binary data"));
        }
        match find("null_value") {
            None => Ok(None),
            Some(Scalar::Text(text)) if datatype == Datatype::Bytes => Ok(Some(text)),
            Some(_) => Err(self.bad_parameter("null_value", "a string, on a BYTES tensor")),
        }
    }

    /// Numbers of the tensor's datatype, widened to 64-bit floats; `NaN` is missing.
    fn numbers(&self, datatype: Datatype, data: Data<'_>, rows: usize) -> Result<Vec<f64>, RequestError> {
        let name = &self.name;
        let values = match data {
            Data::Json { cells, .. } => cells
                .iter()
                .enumerate()
                .map(|(row, cell)| number(cell, datatype).ok_or_else(|| self.bad_value(row, datatype)))
                .collect::<Result<Vec<_>, _>>()?,
            Data::Binary(bytes) => match datatype {
                Datatype::Fp64 => binary::fixed(name, bytes, rows, f64::from_le_bytes)?,
                Datatype::Fp32 => binary::fixed(name, bytes, rows, |b| f64::from(f32::from_le_bytes(b)))?,
                // Above 2^53 the nearest float; declared ranges clamp it anyway.
                Datatype::Int64 => binary::fixed(name, bytes, rows, |b| i64::from_le_bytes(b) as f64)?,
                Datatype::Int32 => binary::fixed(name, bytes, rows, |b| f64::from(i32::from_le_bytes(b)))?,
                Datatype::Bool | Datatype::Bytes => {
                    self.bools(bytes, rows)?.into_iter().map(|b| f64::from(u8::from(b))).collect()
                }
            },
        };
        match values.iter().position(|value| value.is_infinite()) {
            Some(row) => {
                Err(RequestError::BadValue { column: name.clone(), row, expected: "a finite number or NaN" })
            }
            None => Ok(values),
        }
    }

    /// Level codes; `code` maps a text, or nothing for a missing value.
    fn codes(
        &self,
        datatype: Datatype,
        data: Data<'_>,
        rows: usize,
        code: impl Fn(Option<&str>) -> u32,
    ) -> Result<Vec<u32>, RequestError> {
        let name = &self.name;
        let of_int = |value: i64| code(Some(&value.to_string()));
        let of_bool = |value: bool| code(Some(if value { "true" } else { "false" }));
        match data {
            Data::Json { cells, .. } => cells
                .iter()
                .enumerate()
                .map(|(row, cell)| match (cell, datatype) {
                    (Scalar::Null, _) => Ok(code(None)),
                    (Scalar::Text(text), Datatype::Bytes) => Ok(code(Some(text))),
                    (Scalar::Bool(value), Datatype::Bool) => Ok(of_bool(*value)),
                    (Scalar::Int(value), Datatype::Int64) => Ok(of_int(*value)),
                    (Scalar::Int(value), Datatype::Int32) if i32::try_from(*value).is_ok() => {
                        Ok(of_int(*value))
                    }
                    _ => Err(self.bad_value(row, datatype)),
                })
                .collect(),
            Data::Binary(bytes) => match datatype {
                Datatype::Int64 => binary::fixed(name, bytes, rows, |b| of_int(i64::from_le_bytes(b))),
                Datatype::Int32 => binary::fixed(name, bytes, rows, |b| of_int(i32::from_le_bytes(b).into())),
                Datatype::Bool => Ok(self.bools(bytes, rows)?.into_iter().map(of_bool).collect()),
                _ => Ok(binary::texts(name, bytes, rows)?.into_iter().map(|text| code(Some(text))).collect()),
            },
        }
    }

    fn bools(&self, bytes: &[u8], rows: usize) -> Result<Vec<bool>, RequestError> {
        let values = binary::fixed(&self.name, bytes, rows, |[b]: [u8; 1]| b)?;
        match values.iter().position(|b| *b > 1) {
            Some(row) => Err(self.bad_value(row, Datatype::Bool)),
            None => Ok(values.into_iter().map(|b| b == 1).collect()),
        }
    }

    fn bad_value(&self, row: usize, datatype: Datatype) -> RequestError {
        let expected = match datatype {
            Datatype::Bool => "true, false or null (binary: one byte, 0 or 1)",
            Datatype::Int32 => "a 32-bit integer or null",
            Datatype::Int64 => "a 64-bit integer or null",
            Datatype::Fp32 | Datatype::Fp64 => "a number, NaN or null",
            Datatype::Bytes => "a string or null",
        };
        RequestError::BadValue { column: self.name.clone(), row, expected }
    }

    fn bad_parameter(&self, name: &'static str, expected: &'static str) -> RequestError {
        RequestError::BadParameter { at: format!("column {:?}", self.name), name, expected }
    }
}

/// A JSON cell as a number of a datatype; `None` if it isn't one.
fn number(cell: &Scalar, datatype: Datatype) -> Option<f64> {
    match (cell, datatype) {
        (Scalar::Null, _) => Some(f64::NAN),
        (Scalar::Int(value), Datatype::Fp64) => Some(*value as f64),
        (Scalar::Float(value), Datatype::Fp64) => Some(*value),
        // Rounded as the binary form would be, so that both forms get one answer.
        (Scalar::Int(value), Datatype::Fp32) => Some(f64::from(*value as f32)),
        (Scalar::Float(value), Datatype::Fp32) => Some(f64::from(*value as f32)),
        (Scalar::Int(value), Datatype::Int64) => Some(*value as f64),
        (Scalar::Int(value), Datatype::Int32) => i32::try_from(*value).ok().map(f64::from),
        (Scalar::Bool(value), Datatype::Bool) => Some(f64::from(u8::from(*value))),
        _ => None,
    }
}

/// Parameter of a tensor with the bytes of its binary data.
pub(super) const BINARY_SIZE: &str = "binary_data_size";
