//! The calls to etcd that discovery makes: over gRPC by tonic, with the part of etcd's API in `proto/etcd`.
//!
//! Not the crate `etcd-client`, which has all of that API: whoever builds it needs `protoc` and its include files.

use std::time::Duration;

use tonic::{
    Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::{
    proto::etcd::{
        AuthenticateRequest, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest,
        LeaseKeepAliveResponse, LeaseRevokeRequest, PutRequest, RangeRequest, WatchCreateRequest,
        WatchRequest, WatchResponse, auth_client::AuthClient, kv_client::KvClient,
        lease_client::LeaseClient, watch_client::WatchClient, watch_request::RequestUnion,
    },
    settings::Secret,
};

/// A server that is gone without a word would leave a watch open for ever: it is asked this often.
const PING_EVERY: Duration = Duration::from_secs(5);

/// Where etcd is, and what is shown to it.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) user: Option<(String, Secret)>,
}

/// Certificates, as PEM.
#[derive(Clone, Debug, Default)]
pub(super) struct Tls {
    /// What the server's certificate is checked with; absent: what the system trusts.
    pub(super) authority: Option<Vec<u8>>,
    /// Certificate and key to show.
    pub(super) identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// Describes a server.
///
/// # Errors
/// The address is no URL; a certificate cannot be used.
pub(super) fn endpoint(
    url: &str,
    tls: &Tls,
    within: Duration,
) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(url.to_owned())?
        .connect_timeout(within)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_EVERY)
        .keep_alive_while_idle(true);
    if !url.starts_with("https") {
        return Ok(endpoint);
    }
    let mut config = ClientTlsConfig::new();
    config = match &tls.authority {
        Some(pem) => config.ca_certificate(Certificate::from_pem(pem)),
        None => config.with_native_roots(),
    };
    if let Some((certificate, key)) = &tls.identity {
        config = config.identity(Identity::from_pem(certificate, key));
    }
    endpoint.tls_config(config)
}

/// Connections to the servers of one cluster; a call takes one that works. Cheap to clone.
#[derive(Clone)]
pub(super) struct Client {
    channel: InterceptedService<Channel, Token>,
}

/// What a login gave, shown with every call.
#[derive(Clone)]
struct Token(Option<MetadataValue<Ascii>>);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("token", token.clone());
        }
        Ok(request)
    }
}

impl Client {
    /// Dials, and logs in where there is a user. A login lasts for minutes, in which a client is mostly idle: whoever
    /// is refused connects anew.
    pub(super) async fn connect(access: &Access) -> Result<Self, Status> {
        let channel = match &access.endpoints[..] {
            [one] => one.connect_lazy(),
            several => Channel::balance_list(several.iter().cloned()),
        };
        let mut token = None;
        if let Some((name, password)) = &access.user {
            let request = AuthenticateRequest {
                name: name.clone(),
                password: password.reveal().to_owned(),
            };
            let answer = AuthClient::new(channel.clone())
                .authenticate(request)
                .await?;
            let given = answer.into_inner().token.parse();
            token = Some(given.map_err(|_| Status::internal("etcd gave a token that is no text"))?);
        }
        Ok(Self {
            channel: InterceptedService::new(channel, Token(token)),
        })
    }

    /// Returns what is below a prefix, and the revision of that.
    pub(super) async fn below(&self, prefix: &str) -> Result<(Vec<KeyValue>, i64), Status> {
        let request = RangeRequest {
            key: prefix.as_bytes().to_vec(),
            range_end: after(prefix),
        };
        let mut client = KvClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX);
        let answer = client.range(request).await?.into_inner();
        Ok((
            answer.kvs,
            answer.header.map_or(0, |header| header.revision),
        ))
    }

    /// Writes a key that lives as long as a lease.
    pub(super) async fn put(&self, key: &str, value: &[u8], lease: i64) -> Result<(), Status> {
        let request = PutRequest {
            key: key.as_bytes().to_vec(),
            value: value.to_vec(),
            lease,
        };
        KvClient::new(self.channel.clone()).put(request).await?;
        Ok(())
    }

    /// Takes a lease.
    pub(super) async fn grant(&self, ttl: Duration) -> Result<i64, Status> {
        let request = LeaseGrantRequest {
            ttl: ttl.as_secs().cast_signed(),
        };
        let answer = LeaseClient::new(self.channel.clone())
            .lease_grant(request)
            .await?;
        Ok(answer.into_inner().id)
    }

    /// Gives a lease back, and its keys with it.
    pub(super) async fn revoke(&self, lease: i64) -> Result<(), Status> {
        let request = LeaseRevokeRequest { id: lease };
        LeaseClient::new(self.channel.clone())
            .lease_revoke(request)
            .await?;
        Ok(())
    }

    /// Renews a lease at every item of `ticks`, each answered once.
    pub(super) async fn keep_alive(
        &self,
        lease: i64,
        ticks: impl futures::Stream<Item = ()> + Send + 'static,
    ) -> Result<Streaming<LeaseKeepAliveResponse>, Status> {
        use futures::StreamExt;
        let requests = ticks.map(move |()| LeaseKeepAliveRequest { id: lease });
        let answer = LeaseClient::new(self.channel.clone())
            .lease_keep_alive(requests)
            .await?;
        Ok(answer.into_inner())
    }

    /// Follows what changes below a prefix from a revision on.
    pub(super) async fn watch(
        &self,
        prefix: &str,
        revision: i64,
    ) -> Result<Streaming<WatchResponse>, Status> {
        let request = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
                key: prefix.as_bytes().to_vec(),
                range_end: after(prefix),
                start_revision: revision,
            })),
        };
        use futures::StreamExt;
        // The stream of requests stays open: its end is the watch's.
        let requests = futures::stream::iter([request]).chain(futures::stream::pending());
        let mut client =
            WatchClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX);
        Ok(client.watch(requests).await?.into_inner())
    }
}

/// Returns the first key that does not begin with `prefix`, which is not empty and ASCII.
fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
