//! Between a node and its controller, on the wire of both: what each says arrives as another version would have said it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use controller::socket::tls::{self as tls_socket, Tls};
use controller_api::tls;
use prost::bytes::{Buf as _, BufMut as _, Bytes};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{NamedService, StreamingService};
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::common::TestController;

const FOLLOW: &str = "/rampart.v1.Sync/Follow";

/// What becomes of one message.
pub(crate) type Rewrite = Arc<dyn Fn(Bytes) -> Vec<Bytes> + Send + Sync>;

/// Messages as they come.
pub(crate) fn unchanged() -> Rewrite {
    Arc::new(|message| vec![message])
}

/// What is said in each direction.
#[derive(Clone)]
pub(crate) struct Versions {
    pub(crate) to_controller: Rewrite,
    pub(crate) to_node: Rewrite,
}

#[derive(Clone)]
struct Gateway {
    /// As the node.
    upstream: Channel,
    versions: Versions,
}

/// Serves one node, for as long as the runtime lives.
pub(crate) async fn start(controller: &TestController, upstream: Channel, versions: Versions) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let context = &controller.context;
    let identity = context.authority.server_identity(controller::clock::now()).expect("an identity");
    let config = tls::server_config(&identity, context.authority.certificate()).expect("a configuration");
    let incoming = tls_socket::accept(listener, Tls::new(config), context.accepts(), &context.metrics);
    let server = Server::builder().add_service(Gateway { upstream, versions });
    tokio::spawn(server.serve_with_incoming(incoming));
    address
}

impl NamedService for Gateway {
    const NAME: &'static str = "rampart.v1.Sync";
}

impl Service<http::Request<tonic::body::Body>> for Gateway {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        assert_eq!(request.uri().path(), FOLLOW, "a node of these tests makes no other call");
        let gateway = self.clone();
        Box::pin(async move { Ok(tonic::server::Grpc::new(Raw).streaming(gateway, request).await) })
    }
}

type Messages = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

impl StreamingService<Bytes> for Gateway {
    type Response = Bytes;
    type ResponseStream = Messages;
    type Future = BoxFuture<Response<Messages>, Status>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let Self { upstream, versions } = self.clone();
        Box::pin(async move {
            let (sender, receiver) = mpsc::channel(16);
            let mut requests = request.into_inner();
            tokio::spawn(async move {
                while let Ok(Some(message)) = requests.message().await {
                    for message in (versions.to_controller)(message) {
                        if sender.send(message).await.is_err() {
                            return;
                        }
                    }
                }
            });
            let mut client = tonic::client::Grpc::new(upstream);
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let path = http::uri::PathAndQuery::from_static(FOLLOW);
            let requests = Request::new(ReceiverStream::new(receiver));
            let answers = client.streaming(requests, path, Raw).await?.into_inner();
            let rewritten = answers.map(move |answer| match answer {
                Ok(message) => (versions.to_node)(message).into_iter().map(Ok).collect::<Vec<_>>(),
                Err(status) => vec![Err(status)],
            });
            Ok(Response::new(flat(rewritten)))
        })
    }
}

fn flat(mut lists: impl Stream<Item = Vec<Result<Bytes, Status>>> + Send + Unpin + 'static) -> Messages {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Some(list) = lists.next().await {
            for message in list {
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

/// Messages as bytes.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
