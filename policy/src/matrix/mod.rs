//! The compiled matrix.
use std::net::IpAddr;
use crate::id::{CidrId, ClassId, NodeId, Revision};
use crate::limit::LimitError;
use crate::network::Network;
use crate::slice::Slice;
use crate::verdict::{Flow, Verdict};
mod cell;
pub use cell::{Cell, CellEntry, CellError};
#[derive(Debug)]
pub struct Matrix {}
impl Matrix {
    pub fn compile(_network: &Network) -> Result<Matrix, LimitError> { unreachable!() }
    pub fn verdict(&self, _flow: &Flow) -> Verdict { unreachable!() }
    pub fn class_of(&self, _address: IpAddr) -> Option<(ClassId, CidrId)> { unreachable!() }
    pub fn cell(&self, _source: ClassId, _destination: ClassId) -> Cell { unreachable!() }
    pub fn classes_of(&self, _cidr: CidrId) -> Vec<ClassId> { unreachable!() }
    pub fn slice(&self, _network: &Network, _revision: Revision, _node: NodeId, _previous: Option<&Slice>) -> Option<Slice> { unreachable!() }
}
