//! Who is behind a connection, by what the connection itself shows. Whether they may still call is for the gate to say, at
//! each call.

use std::net::{IpAddr, SocketAddr};

use controller_api::identity::{self, Identity};
use policy::NetworkName;

use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::store::account::KeyHash;

/// Who is behind a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// Root, on the Unix socket.
    Root,
    /// Over TLS, without a certificate.
    Anonymous {
        address: SocketAddr,
    },
    Certified {
        address: SocketAddr,
        certificate: Certificate,
    },
}

/// What a certificate of the network's authority says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub network: NetworkName,
    pub identity: Identity,
    pub key: KeyHash,
    /// Seconds since the epoch.
    pub expires_at: u64,
}

impl Principal {
    /// `None` on the Unix socket.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Root => None,
            Self::Anonymous { address } | Self::Certified { address, .. } => Some(address.ip().to_canonical()),
        }
    }
}

impl Certificate {
    /// Reads one (DER) that was verified before.
    pub(super) fn read(der: &[u8]) -> Result<Self, String> {
        let (network, identity) = Identity::of_certificate(der).map_err(|error| error.to_string())?;
        let (_, expires_at) = identity::validity(der).map_err(|error| error.to_string())?;
        let key = key_of_certificate(der).ok_or("certificate has no key that can be read")?;
        Ok(Self { network, identity, key, expires_at })
    }
}

/// The hash of the public key in a certificate (DER) that was verified before. `None`: it cannot be parsed.
pub fn key_of_certificate(der: &[u8]) -> Option<KeyHash> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(KeyHash(Sha256::digest(certificate.tbs_certificate.subject_pki.raw).into()))
}
