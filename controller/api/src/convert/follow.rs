//! What comes on a node's stream, put together from its parts.

use std::net::SocketAddr;

use policy::{NodeId, SliceDelta};
use prost::{DecodeError, Message};

use super::{ConvertError, id, parse};
use crate::v1;

/// Why an answer on a node's stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error("an answer on the stream cannot be decoded")]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Convert(#[from] ConvertError),
}

/// What one answer says; what this reader does not know is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    pub update: Option<SliceDelta>,
    pub endpoints: Vec<(NodeId, SocketAddr)>,
}

impl TryFrom<v1::FollowResponse> for Followed {
    type Error = FollowError;

    fn try_from(response: v1::FollowResponse) -> Result<Self, FollowError> {
        let v1::FollowResponse { update, endpoints } = response;
        let update: Option<v1::Update> = joined(&update)?;
        let endpoints: Option<v1::Endpoints> = joined(&endpoints)?;
        Ok(Self {
            update: update.map(SliceDelta::try_from).transpose()?,
            endpoints: endpoints.map(endpoints_from_wire).transpose()?.unwrap_or_default(),
        })
    }
}

/// One message from its parts; `None` for none.
fn joined<M: Message + Default>(parts: &[prost::bytes::Bytes]) -> Result<Option<M>, DecodeError> {
    if parts.is_empty() {
        return Ok(None);
    }
    let mut message = M::default();
    parts.iter().try_for_each(|part| message.merge(part.clone()))?;
    Ok(Some(message))
}

/// Where peers were seen.
pub fn endpoints_from_wire(endpoints: v1::Endpoints) -> Result<Vec<(NodeId, SocketAddr)>, ConvertError> {
    let v1::Endpoints { peers } = endpoints;
    let of_peer = |peer: v1::PeerEndpoint| {
        let v1::PeerEndpoint { node, endpoint } = peer;
        Ok((id("endpoints.node", node, NodeId)?, parse("endpoints.endpoint", &endpoint)?))
    };
    peers.into_iter().map(of_peer).collect()
}

/// The inverse of [`endpoints_from_wire`].
pub fn endpoints_to_wire(peers: impl IntoIterator<Item = (NodeId, SocketAddr)>) -> v1::Endpoints {
    let of_peer =
        |(node, endpoint): (NodeId, SocketAddr)| v1::PeerEndpoint { node: node.0, endpoint: endpoint.to_string() };
    v1::Endpoints { peers: peers.into_iter().map(of_peer).collect() }
}

#[cfg(test)]
mod tests {
    use policy::{Digest, Revision};

    use super::*;

    fn response(delta: &SliceDelta, split: usize) -> v1::FollowResponse {
        let update = v1::Update::from(delta);
        // Any field may be in any part; the fields of one message are one after the other.
        let (head, tail) = (
            v1::Update { from: update.from, revision: update.revision, ..v1::Update::default() },
            v1::Update { from: 0, revision: 0, ..update },
        );
        let parts = if split == 0 {
            vec![v1::Update::from(delta).encode_to_vec()]
        } else {
            vec![head.encode_to_vec(), tail.encode_to_vec()]
        };
        let endpoints = endpoints_to_wire([(NodeId(3), "192.0.2.1:51820".parse().expect("an endpoint"))]);
        v1::FollowResponse {
            update: parts.into_iter().map(Into::into).collect(),
            endpoints: vec![endpoints.encode_to_vec().into()],
        }
    }

    #[test]
    fn parts_are_one_message() {
        let digest = Digest::from_bytes([3; 16]);
        let delta = SliceDelta { from: Revision(2), revision: Revision(3), digest, ..SliceDelta::default() };
        for split in [0, 1] {
            let followed = Followed::try_from(response(&delta, split)).expect("reads");
            assert_eq!(followed.update.as_ref(), Some(&delta));
            assert_eq!(followed.endpoints.len(), 1);
        }
        assert_eq!(Followed::try_from(v1::FollowResponse::default()).expect("reads"), Followed::default());
    }

    /// A newer controller may say more: in the answer, in the update and in its rows.
    #[test]
    fn what_is_not_known_is_left_out() {
        let delta = SliceDelta { revision: Revision(3), ..SliceDelta::default() };
        let mut update = v1::Update::from(&delta).encode_to_vec();
        // Field 1000, a varint.
        update.extend([0xc0, 0x3e, 0x05]);
        let mut bytes = v1::FollowResponse { update: vec![update.into()], endpoints: Vec::new() }.encode_to_vec();
        bytes.extend([0xc0, 0x3e, 0x05]);
        let response = v1::FollowResponse::decode(&bytes[..]).expect("decodes");
        assert_eq!(Followed::try_from(response).expect("reads").update, Some(delta));
        // A kind of answer of which this reader knows nothing.
        let strange = v1::FollowResponse::decode(&[0xc0, 0x3e, 0x05][..]).expect("decodes");
        assert_eq!(Followed::try_from(strange).expect("reads"), Followed::default());
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let damaged = v1::FollowResponse { update: vec![vec![0xff].into()], endpoints: Vec::new() };
        assert!(matches!(Followed::try_from(damaged), Err(FollowError::Decode(_))));
        let endpoints = v1::Endpoints { peers: vec![v1::PeerEndpoint { node: 1, endpoint: "here".to_owned() }] };
        let wrong = v1::FollowResponse { update: Vec::new(), endpoints: vec![endpoints.encode_to_vec().into()] };
        assert!(Followed::try_from(wrong).expect_err("refused").to_string().contains("endpoints.endpoint"));
    }
}
