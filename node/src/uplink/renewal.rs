//! A node's certificate is renewed in good time; until then the old one serves.

use std::time::Duration;

use controller_api::v1::sync_client::SyncClient;
use controller_api::{defaults, v1};
use host::clock::now;
use tonic::transport::Channel;

use crate::uplink::identity::{Identity, IdentityError, Keys};

/// Between two attempts.
pub(super) const AGAIN: Duration = Duration::from_secs(60);

/// The identity with a new certificate.
pub(super) async fn renewed(
    sync: &mut SyncClient<Channel>,
    identity: &Identity,
    keys: &Keys,
) -> Result<Identity, String> {
    let text = |error: IdentityError| error.to_string();
    let mut request =
        tonic::Request::new(v1::RenewRequest { certificate_request: keys.certificate_request().map_err(text)? });
    request.set_timeout(defaults::REQUEST_TIMEOUT);
    let response = sync.renew(request).await.map_err(|status| status.message().to_owned())?;
    let v1::RenewResponse { certificate } = response.into_inner();
    let named = |der: &[u8]| controller_api::identity::Identity::of_certificate(der).map_err(|error| error.to_string());
    if named(&certificate)? != named(&identity.certificate)? {
        return Err("the new certificate names another node".to_owned());
    }
    let fresh = Identity { certificate, ..identity.clone() };
    keys.client_identity(&fresh).map_err(text)?;
    Ok(fresh)
}

/// How long until the certificate is to be renewed.
pub(super) fn wait(identity: &Identity) -> Duration {
    identity.validity().map_or(AGAIN, |(begin, end)| Duration::from_secs(renew_at(begin, end).saturating_sub(now())))
}

/// When a certificate that is good from `begin` to `end` (seconds since the epoch) is renewed.
fn renew_at(begin: u64, end: u64) -> u64 {
    begin + defaults::renew_after(Duration::from_secs(end.saturating_sub(begin))).as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_renewed_at_two_thirds_of_its_life() {
        assert_eq!(renew_at(1_000, 1_000 + 86_400), 1_000 + 86_400 * 66 / 100);
        assert_eq!(renew_at(5, 1), 5);
    }
}
