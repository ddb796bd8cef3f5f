//! The body of a stream of updates: gRPC frames whose parts are shared by all streams, not copied for each.
//!
//! tonic's own encoder copies every message into a buffer of the stream, and keeps that buffer, as large as the largest
//! message was, for as long as the stream lives: with a snapshot in each, more memory than everything else of a node.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use controller_api::defaults::MAX_RESPONSE;
use controller_api::v1;
use http_body::Frame;
use prost::bytes::{BufMut as _, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;

use crate::follow::dispatcher::Queued;

/// Fields of [`v1::FollowResponse`].
const UPDATE: u32 = 1;
const ENDPOINTS: u32 = 2;
/// A part of fewer bytes is copied into its frame: it is not worth a buffer and an HTTP/2 frame of its own.
const SHARED_MIN: usize = 1_024;
/// Bytes of a gRPC frame's head: a flag (0: not compressed), and the length of the message.
const HEAD: usize = 5;

/// What a stream's queue holds, as a response carries it from the service to [`Framed`], which sends it.
#[derive(Clone, Debug)]
pub(super) struct Frames(Arc<Mutex<Option<mpsc::Receiver<Queued>>>>);

impl Frames {
    pub(super) fn new(queue: mpsc::Receiver<Queued>) -> Self {
        Self(Arc::new(Mutex::new(Some(queue))))
    }

    fn take(&self) -> Option<mpsc::Receiver<Queued>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A service, with the body of a response that carries [`Frames`] replaced by these.
#[derive(Clone, Debug)]
pub(super) struct Framed<S>(pub(super) S);

impl<S: NamedService> NamedService for Framed<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Framed<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let response = self.0.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            let frames = response.extensions_mut().remove::<Frames>();
            Ok(match frames.and_then(|frames| frames.take()) {
                Some(queue) => response.map(|_| Body::new(FramesBody::new(queue))),
                None => response,
            })
        })
    }
}

/// Messages until the first error, which becomes the stream's status.
#[derive(Debug)]
struct FramesBody {
    queue: mpsc::Receiver<Queued>,
    /// What is left of the message that is being sent.
    rest: VecDeque<Bytes>,
    has_ended: bool,
}

impl FramesBody {
    fn new(queue: mpsc::Receiver<Queued>) -> Self {
        Self { queue, rest: VecDeque::new(), has_ended: false }
    }
}

impl http_body::Body for FramesBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(bytes) = self.rest.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if self.has_ended {
                return Poll::Ready(None);
            }
            let status = match ready!(self.queue.poll_recv(context)) {
                Some(Ok(response)) => match frame(response) {
                    Ok(parts) => {
                        self.rest = parts;
                        continue;
                    }
                    Err(status) => status,
                },
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            self.has_ended = true;
            self.queue.close();
            let mut trailers = http::HeaderMap::new();
            status.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended && self.rest.is_empty()
    }
}

/// A message as gRPC frames it, in parts. Errors: the message is longer than [`MAX_RESPONSE`].
fn frame(response: v1::FollowResponse) -> Result<VecDeque<Bytes>, Status> {
    let v1::FollowResponse { update, endpoints } = response;
    let fields =
        update.into_iter().map(|part| (UPDATE, part)).chain(endpoints.into_iter().map(|part| (ENDPOINTS, part)));
    let fields: Vec<(u32, Bytes)> = fields.collect();
    let length_of = |(field, part): &(u32, Bytes)| key_len(*field) + encoded_len_varint(part.len() as u64) + part.len();
    let length: usize = fields.iter().map(length_of).sum();
    let head = u32::try_from(length).ok().filter(|_| length <= MAX_RESPONSE).ok_or_else(|| {
        Status::out_of_range(format!("an update of {length} bytes is longer than the {MAX_RESPONSE} that are sent"))
    })?;
    let (mut frame, mut open) = (VecDeque::new(), BytesMut::with_capacity(HEAD + length.min(SHARED_MIN)));
    open.put_u8(0);
    open.put_u32(head);
    for (field, part) in fields {
        encode_key(field, WireType::LengthDelimited, &mut open);
        encode_varint(part.len() as u64, &mut open);
        if part.len() < SHARED_MIN {
            open.extend_from_slice(&part);
        } else {
            frame.extend([std::mem::take(&mut open).freeze(), part]);
        }
    }
    if !open.is_empty() {
        frame.push_back(open.freeze());
    }
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn part(length: usize) -> Bytes {
        vec![7; length].into()
    }

    fn joined(parts: impl IntoIterator<Item = Bytes>) -> Vec<u8> {
        parts.into_iter().flatten().collect()
    }

    #[test]
    fn a_frame_is_what_the_message_encodes_to_and_large_parts_are_shared() {
        for (update, endpoints) in [
            (vec![], vec![]),
            (vec![part(3), part(100)], vec![]),
            (vec![part(40), part(SHARED_MIN), part(200_000)], vec![part(5)]),
            (vec![part(70_000)], vec![part(3_000)]),
            (vec![], vec![part(0)]),
        ] {
            let response = v1::FollowResponse { update, endpoints };
            let message = response.encode_to_vec();
            let large: Vec<*const u8> = response
                .update
                .iter()
                .chain(&response.endpoints)
                .filter(|part| part.len() >= SHARED_MIN)
                .map(|part| part.as_ptr())
                .collect();
            let parts = frame(response).expect("short enough");
            let shared = parts.iter().map(|part| part.as_ptr()).filter(|start| large.contains(start)).count();
            assert_eq!(shared, large.len());
            assert!(parts.len() <= 2 * large.len() + 1);
            let length = u32::try_from(message.len()).expect("short").to_be_bytes();
            assert_eq!(joined(parts), [&[0][..], &length, &message].concat());
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let response = v1::FollowResponse { update: vec![part(MAX_RESPONSE)], endpoints: vec![] };
        assert_eq!(frame(response).expect_err("too long").code(), tonic::Code::OutOfRange);
    }

    #[tokio::test]
    async fn the_first_error_is_the_status_and_nothing_follows() {
        use http_body::Body as _;
        let (sender, queue) = mpsc::channel(4);
        let response = v1::FollowResponse { update: vec![part(2)], endpoints: vec![] };
        for queued in [Ok(response.clone()), Err(Status::aborted("another")), Ok(response)] {
            sender.send(queued).await.expect("room");
        }
        let mut body = FramesBody::new(queue);
        let mut next = async || std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        let data = next().await.expect("a frame").expect("no error").into_data().expect("data");
        assert_eq!(data.len(), HEAD + 4);
        let trailers = next().await.expect("a frame").expect("no error").into_trailers().expect("trailers");
        assert_eq!(Status::from_header_map(&trailers).expect("a status").code(), tonic::Code::Aborted);
        assert!(next().await.is_none());
        assert!(sender.is_closed() && body.is_end_stream());
    }
}
