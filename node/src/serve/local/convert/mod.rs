//! Between the wire and what is shown. To the wire nothing can fail; from the wire everything is checked, and an error names
//! the field and the value.
//!
//! Every conversion takes its input apart field by field, so that a new field breaks the build until somebody has decided
//! what it means.

use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;

use super::v1;
use crate::view::Direction;

mod explanation;
mod policy;
mod status;
mod traffic;
mod verified;

/// A message with a missing, unknown or invalid field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    #[error("`{field}` is missing")]
    Missing { field: &'static str },
    #[error("`{field}` is {value}, which this version does not know")]
    Unknown { field: &'static str, value: i32 },
    #[error("`{field}` is `{value}`: {reason}")]
    Invalid { field: &'static str, value: String, reason: String },
}

fn parse<T>(field: &'static str, text: &str) -> Result<T, ConvertError>
where
    T: FromStr,
    T::Err: Display,
{
    text.parse().map_err(|error: T::Err| ConvertError::Invalid {
        field,
        value: text.to_owned(),
        reason: error.to_string(),
    })
}

fn parse_some<T>(field: &'static str, text: Option<String>) -> Result<Option<T>, ConvertError>
where
    T: FromStr,
    T::Err: Display,
{
    text.map(|text| parse(field, &text)).transpose()
}

fn parse_all<T>(field: &'static str, texts: &[String]) -> Result<Vec<T>, ConvertError>
where
    T: FromStr,
    T::Err: Display,
{
    texts.iter().map(|text| parse(field, text)).collect()
}

fn print_all<T: Display>(items: &[T]) -> Vec<String> {
    items.iter().map(T::to_string).collect()
}

fn print_some<T: Display>(item: Option<T>) -> Option<String> {
    item.map(|item| item.to_string())
}

fn address(field: &'static str, text: &str) -> Result<IpAddr, ConvertError> {
    parse(field, text)
}

fn required<T>(field: &'static str, value: Option<T>) -> Result<T, ConvertError> {
    value.ok_or(ConvertError::Missing { field })
}

/// A number that must fit into fewer bits.
fn narrow<W, T>(field: &'static str, value: W) -> Result<T, ConvertError>
where
    W: Copy + Display,
    T: TryFrom<W>,
{
    T::try_from(value).map_err(|_| ConvertError::Invalid {
        field,
        value: value.to_string(),
        reason: format!("it is more than {} bits", size_of::<T>() * 8),
    })
}

fn narrow_some<T: TryFrom<u32>>(field: &'static str, value: Option<u32>) -> Result<Option<T>, ConvertError> {
    value.map(|value| narrow(field, value)).transpose()
}

/// Each of a list.
fn all<W, T: TryFrom<W, Error = ConvertError>>(items: Vec<W>) -> Result<Vec<T>, ConvertError> {
    items.into_iter().map(T::try_from).collect()
}

fn wired<T, W: From<T>>(items: Vec<T>) -> Vec<W> {
    items.into_iter().map(W::from).collect()
}

impl From<Direction> for v1::Direction {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Egress => Self::Egress,
            Direction::Ingress => Self::Ingress,
        }
    }
}

fn direction_to_wire(direction: Direction) -> i32 {
    v1::Direction::from(direction).into()
}

fn direction(field: &'static str, value: i32) -> Result<Direction, ConvertError> {
    match v1::Direction::try_from(value) {
        Ok(v1::Direction::Egress) => Ok(Direction::Egress),
        Ok(v1::Direction::Ingress) => Ok(Direction::Ingress),
        Ok(v1::Direction::Unspecified) | Err(_) => Err(ConvertError::Unknown { field, value }),
    }
}
