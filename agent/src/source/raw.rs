//! Batches as read: one column per declared column, in a handful of physical forms.
//!
//! Owns the mapping from Arrow types to those forms, and which Arrow types fit a declared type. Values are not
//! judged here beyond their type; a value that can't be read as its type is marked, not guessed.

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int32Type, Int64Type, TimestampMillisecondType};
use arrow_array::{
    Array, ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, StringArray,
    TimestampMillisecondArray,
};
use arrow_cast::cast;
use arrow_schema::{DataType, TimeUnit};
use tabmesh_contract::contract::{Column, FeatureType, LogicalType};
use tabmesh_contract::profile::Cell;

/// Some rows of a table, columns in the contract's order.
#[derive(Debug, Clone)]
pub struct RawBatch {
    columns: Vec<RawColumn>,
    rows: usize,
}

impl RawBatch {
    pub(crate) fn new(columns: Vec<RawColumn>, rows: usize) -> Self {
        Self { columns, rows }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns in the contract's order.
    #[must_use]
    pub fn columns(&self) -> &[RawColumn] {
        &self.columns
    }
}

/// The values of one column.
#[derive(Debug, Clone)]
pub struct RawColumn {
    values: Values,
    /// Rows whose value couldn't be read as the declared type; empty if there are none.
    unreadable: Vec<bool>,
}

#[derive(Debug, Clone)]
enum Values {
    Number(Float64Array),
    Integer(Int64Array),
    Bool(BooleanArray),
    Text(StringArray),
    /// Text as places in a list of its values.
    Levels {
        places: Int32Array,
        values: StringArray,
    },
    Time(TimestampMillisecondArray),
    /// Values of a type that is only counted.
    Opaque(ArrayRef),
}

impl RawColumn {
    /// The value in a row; null beyond the end.
    #[must_use]
    pub fn cell(&self, row: usize) -> Cell<'_> {
        fn at<A: Array>(array: &A, row: usize) -> bool {
            row < array.len() && !array.is_null(row)
        }
        if self.unreadable.get(row).copied().unwrap_or(false) {
            return Cell::Unreadable;
        }
        match &self.values {
            Values::Number(a) if at(a, row) => Cell::Number(a.value(row)),
            Values::Integer(a) if at(a, row) => Cell::Integer(a.value(row)),
            Values::Bool(a) if at(a, row) => Cell::Bool(a.value(row)),
            Values::Text(a) if at(a, row) => Cell::Text(a.value(row)),
            Values::Levels { places, values } if at(places, row) => place_cell(values, places.value(row)),
            Values::Time(a) if at(a, row) => Cell::TimeMs(a.value(row)),
            // Nested values are counted as present, never looked into.
            Values::Opaque(a) if at(a, row) => Cell::Bool(true),
            _ => Cell::Null,
        }
    }

    /// What `of` makes of each cell of the first `rows`. It is asked once for each value where values are listed.
    pub(crate) fn map<T: Copy>(&self, rows: usize, of: impl Fn(Cell<'_>) -> T) -> Vec<T> {
        match &self.values {
            Values::Levels { places, values } if values.len() <= rows && places.len() == rows => {
                let null = of(Cell::Null);
                let listed: Vec<T> =
                    (0i32..).take(values.len()).map(|at| of(place_cell(values, at))).collect();
                let value = |place: i32| usize::try_from(place).ok().and_then(|at| listed.get(at)).copied();
                places.iter().map(|place| place.and_then(value).unwrap_or(null)).collect()
            }
            _ => (0..rows).map(|row| of(self.cell(row))).collect(),
        }
    }

    /// Numbers of the first `rows`: whole ones and true and false too, `NaN` where there is none.
    #[allow(clippy::cast_precision_loss, reason = "a model reads numbers as floats anyway")]
    pub(crate) fn as_numbers(&self, rows: usize) -> Vec<f64> {
        let finite = |value: f64| if value.is_finite() { value } else { f64::NAN };
        let whole = self.unreadable.is_empty();
        match &self.values {
            Values::Number(a) if whole && a.len() == rows => {
                a.iter().map(|value| value.map_or(f64::NAN, finite)).collect()
            }
            Values::Integer(a) if whole && a.len() == rows => {
                a.iter().map(|value| value.map_or(f64::NAN, |value| value as f64)).collect()
            }
            _ => self.map(rows, |cell| match cell {
                Cell::Number(value) => finite(value),
                Cell::Integer(value) => value as f64,
                Cell::Bool(value) => f64::from(u8::from(value)),
                _ => f64::NAN,
            }),
        }
    }

    /// Whether a text column is best read as places in a list of its values.
    pub(crate) fn wants_levels(column: &Column, found: &DataType) -> bool {
        let text = matches!(found, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
        text && Wanted::of(column) == Wanted::Level
    }

    /// The type that text is then read as.
    pub(crate) fn levels_type() -> DataType {
        DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))
    }

    /// Brings an array of a fitting type into its physical form.
    ///
    /// # Errors
    /// What was expected, in words, if the type doesn't fit the declaration.
    pub(crate) fn from_array(column: &Column, array: &ArrayRef) -> Result<Self, String> {
        let wanted = Wanted::of(column);
        if !wanted.accepts(array.data_type()) {
            return Err(wanted.words().to_owned());
        }
        if wanted == Wanted::Level && *array.data_type() == Self::levels_type() {
            let levels = array.as_dictionary::<Int32Type>();
            let (places, values) = (levels.keys().clone(), levels.values().as_string::<i32>().clone());
            return Ok(Self { values: Values::Levels { places, values }, unreadable: Vec::new() });
        }
        let plain = match array.data_type() {
            DataType::Dictionary(_, values) => convert(array, values),
            _ => ArrayRef::clone(array),
        };
        let values = match plain.data_type() {
            _ if wanted == Wanted::Anything => Values::Opaque(plain),
            DataType::Null => Values::Opaque(plain),
            DataType::Boolean => Values::Bool(plain.as_boolean().clone()),
            DataType::Int8
            | DataType::Int16
            | DataType::Int32
            | DataType::Int64
            | DataType::UInt8
            | DataType::UInt16
            | DataType::UInt32 => {
                Values::Integer(convert(&plain, &DataType::Int64).as_primitive::<Int64Type>().clone())
            }
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
                let text = convert(&plain, &DataType::Utf8).as_string::<i32>().clone();
                if wanted == Wanted::Moment {
                    return Ok(Self::times_of_text(&text));
                }
                Values::Text(text)
            }
            DataType::Date32 | DataType::Date64 | DataType::Timestamp(_, _) => {
                let times = convert(&plain, &DataType::Timestamp(TimeUnit::Millisecond, None));
                Values::Time(times.as_primitive::<TimestampMillisecondType>().clone())
            }
            // What is left among the accepted types is numeric: floats, decimals, unsigned 64-bit.
            _ => {
                let numbers = convert(&plain, &DataType::Float64).as_primitive::<Float64Type>().clone();
                return Ok(Self::numbers(column, numbers));
            }
        };
        Ok(Self { values, unreadable: Vec::new() })
    }

    /// Reads text cells of a delimited file as the declared type.
    pub(crate) fn from_text(column: &Column, text: &StringArray) -> Self {
        match Wanted::of(column) {
            Wanted::Level | Wanted::Text | Wanted::Anything => {
                Self { values: Values::Text(text.clone()), unreadable: Vec::new() }
            }
            Wanted::Moment => Self::times_of_text(text),
            Wanted::Bool => {
                let parse = |t: &str| match t.trim() {
                    "true" | "True" | "TRUE" | "1" => Some(true),
                    "false" | "False" | "FALSE" | "0" => Some(false),
                    _ => None,
                };
                let values: BooleanArray = text.iter().map(|t| t.and_then(parse)).collect();
                let unreadable = unreadable(text, &values);
                Self { values: Values::Bool(values), unreadable }
            }
            Wanted::Numeric => {
                if column.logical_type == LogicalType::Integer {
                    let whole: Int64Array =
                        text.iter().map(|t| t.and_then(|t| t.trim().parse().ok())).collect();
                    if whole.null_count() == text.null_count() {
                        return Self { values: Values::Integer(whole), unreadable: Vec::new() };
                    }
                }
                let parse = |t: &str| t.trim().parse::<f64>().ok();
                let values: Float64Array = text.iter().map(|t| t.and_then(parse)).collect();
                let not_numbers = unreadable(text, &values);
                let mut numbers = Self::numbers(column, values);
                if numbers.unreadable.is_empty() {
                    numbers.unreadable = not_numbers;
                } else {
                    for (mark, other) in numbers.unreadable.iter_mut().zip(not_numbers) {
                        *mark |= other;
                    }
                }
                numbers
            }
        }
    }

    /// First row whose value couldn't be read.
    pub(crate) fn first_unreadable(&self) -> Option<usize> {
        self.unreadable.iter().position(|&u| u)
    }

    fn numbers(column: &Column, values: Float64Array) -> Self {
        let unreadable = if column.logical_type == LogicalType::Integer {
            values.iter().map(|v| v.is_some_and(|v| v.is_finite() && v.fract().abs() > 0.0)).collect()
        } else {
            Vec::new()
        };
        let unreadable = if unreadable.contains(&true) { unreadable } else { Vec::new() };
        Self { values: Values::Number(values), unreadable }
    }

    fn times_of_text(text: &StringArray) -> Self {
        let text_ref: ArrayRef = std::sync::Arc::new(text.clone());
        let times = convert(&text_ref, &DataType::Timestamp(TimeUnit::Millisecond, None));
        let values = times.as_primitive::<TimestampMillisecondType>().clone();
        let unreadable = unreadable(text, &values);
        Self { values: Values::Time(values), unreadable }
    }
}

/// The listed value at a place; null beyond the list.
fn place_cell(values: &StringArray, place: i32) -> Cell<'_> {
    match usize::try_from(place) {
        Ok(at) if at < values.len() && !values.is_null(at) => Cell::Text(values.value(at)),
        _ => Cell::Null,
    }
}

/// What a declaration accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Numeric,
    Bool,
    Text,
    /// A categorical column: text, whole numbers or true/false.
    Level,
    Moment,
    Anything,
}

impl Wanted {
    fn of(column: &Column) -> Self {
        match column.logical_type {
            LogicalType::Integer | LogicalType::Number => Self::Numeric,
            LogicalType::Boolean => Self::Bool,
            LogicalType::String if column.feature_type == Some(FeatureType::Categorical) => Self::Level,
            LogicalType::String => Self::Text,
            LogicalType::Date | LogicalType::Timestamp => Self::Moment,
            LogicalType::Time | LogicalType::Other => Self::Anything,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Numeric => "a number",
            Self::Bool => "true or false",
            Self::Text => "text",
            Self::Level => "text, a whole number or true or false",
            Self::Moment => "a date or timestamp",
            Self::Anything => "anything",
        }
    }

    fn accepts(self, found: &DataType) -> bool {
        let text = |t: &DataType| matches!(t, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
        match (self, found) {
            (Self::Anything, _) | (_, DataType::Null) => true,
            (_, DataType::Dictionary(_, values)) => self.accepts(values),
            (Self::Numeric, t) => t.is_numeric(),
            (Self::Bool, t) => *t == DataType::Boolean,
            (Self::Text, t) => text(t),
            (Self::Level, t) => text(t) || t.is_integer() || *t == DataType::Boolean,
            (Self::Moment, t) => {
                text(t) || matches!(t, DataType::Date32 | DataType::Date64 | DataType::Timestamp(_, _))
            }
        }
    }
}

/// Casts between types that [`Wanted::accepts`] let through; values that don't fit become null.
fn convert(array: &ArrayRef, to: &DataType) -> ArrayRef {
    // Arrow casts every accepted pair; should one be missing, the values are missing too, not wrong.
    cast(array, to).unwrap_or_else(|_| arrow_array::new_null_array(to, array.len()))
}

/// Marks cells that had text and got no value.
fn unreadable(text: &StringArray, values: &dyn Array) -> Vec<bool> {
    if values.null_count() == text.null_count() {
        return Vec::new();
    }
    (0..text.len()).map(|row| !text.is_null(row) && values.is_null(row)).collect()
}
