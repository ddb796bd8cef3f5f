//! Whom a certificate names: the URI `rampart://<network>/node/<id>`, `…/admin/<name>` or `…/controller` among its subject
//! alternative names.

use policy::{NetworkName, NodeId};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

const SCHEME: &str = "rampart://";

/// Who holds a certificate, within its network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    Node(NodeId),
    /// The admin's name, as in `alice`.
    Admin(String),
    Controller,
}

/// A certificate that names nobody of a network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("certificate cannot be read: {reason}")]
    Certificate { reason: String },
    #[error("certificate has {count} names beginning with `rampart://` where it must have one")]
    Names { count: usize },
    #[error("certificate name `{uri}` {reason}")]
    Uri { uri: String, reason: &'static str },
}

impl Identity {
    /// The name to put into a certificate.
    pub fn to_uri(&self, network: &NetworkName) -> String {
        match self {
            Self::Node(id) => format!("{SCHEME}{network}/node/{}", id.0),
            Self::Admin(name) => format!("{SCHEME}{network}/admin/{name}"),
            Self::Controller => format!("{SCHEME}{network}/controller"),
        }
    }

    /// Exactly what [`Identity::to_uri`] prints, nothing looser.
    pub fn from_uri(uri: &str) -> Result<(NetworkName, Self), IdentityError> {
        let error = |reason| IdentityError::Uri { uri: uri.to_owned(), reason };
        let rest = uri.strip_prefix(SCHEME).ok_or_else(|| error("does not begin with `rampart://`"))?;
        let (network, subject) = rest.split_once('/').ok_or_else(|| error("names nobody"))?;
        let network: NetworkName = network.parse().map_err(|_| error("has no valid network"))?;
        let identity = match subject.split_once('/') {
            None if subject == "controller" => Self::Controller,
            Some(("node", id)) => Self::Node(NodeId(canonical_id(id).ok_or_else(|| error("has no valid node id"))?)),
            Some(("admin", name)) if is_admin_name(name) => Self::Admin(name.to_owned()),
            Some(("admin", _)) => return Err(error("has no valid admin name")),
            _ => return Err(error("names neither a node, an admin nor the controller")),
        };
        Ok((network, identity))
    }

    /// Whom a certificate (DER) names. It must have been verified before.
    pub fn of_certificate(der: &[u8]) -> Result<(NetworkName, Self), IdentityError> {
        let certificate = parse(der)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::Certificate { reason: error.to_string() })?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
                _ => None,
            })
            .collect();
        match uris[..] {
            [uri] => Self::from_uri(uri),
            _ => Err(IdentityError::Names { count: uris.len() }),
        }
    }
}

/// When a certificate (DER) begins and ends, in seconds since the epoch.
pub fn validity(der: &[u8]) -> Result<(u64, u64), IdentityError> {
    let certificate = parse(der)?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Ok((seconds(certificate.validity().not_before), seconds(certificate.validity().not_after)))
}

/// Whether a text can be an admin's name: the same letters as every other name.
pub fn is_admin_name(name: &str) -> bool {
    name.parse::<policy::NodeName>().is_ok()
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(IdentityError::Certificate { reason: "bytes follow it".to_owned() }),
        Err(error) => Err(IdentityError::Certificate { reason: error.to_string() }),
    }
}

fn canonical_id(text: &str) -> Option<u32> {
    let id: u32 = text.parse().ok()?;
    (id != 0 && id.to_string() == text).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_print_as_they_parse() {
        let network: NetworkName = "corp".parse().expect("a name");
        for (identity, uri) in [
            (Identity::Node(NodeId(7)), "rampart://corp/node/7"),
            (Identity::Admin("alice".to_owned()), "rampart://corp/admin/alice"),
            (Identity::Controller, "rampart://corp/controller"),
        ] {
            assert_eq!(identity.to_uri(&network), uri);
            assert_eq!(Identity::from_uri(uri), Ok((network.clone(), identity)));
        }
    }

    #[test]
    fn nothing_looser_names_anybody() {
        for uri in [
            "",
            "rampart://",
            "rampart://corp",
            "rampart://corp/",
            "rampart://corp/node",
            "rampart://corp/node/",
            "rampart://corp/node/0",
            "rampart://corp/node/07",
            "rampart://corp/node/+7",
            "rampart://corp/node/7/x",
            "rampart://corp/node/4294967296",
            "rampart://corp/admin/",
            "rampart://corp/admin/A",
            "rampart://corp/admin/a/b",
            "rampart://corp/controller/",
            "rampart://CORP/controller",
            "https://corp/controller",
            "rampart:///controller",
        ] {
            assert!(Identity::from_uri(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn garbage_is_no_certificate() {
        assert!(matches!(Identity::of_certificate(b"garbage"), Err(IdentityError::Certificate { .. })));
        assert!(validity(&[]).is_err());
    }
}
