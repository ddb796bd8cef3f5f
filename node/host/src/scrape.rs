//! What Prometheus fetches: an HTTP server for one text.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Connections served at a time, for one scrape each; more wait. Any user of this machine may connect.
const CONCURRENT: usize = 8;
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait when the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Gives the figures of this moment as OpenMetrics 1.0, or says why there are none.
pub type Source = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<String, String>> + Send>> + Send + Sync>;

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("failed to serve metrics at `{address}`; choose another address with `--metrics`, or `off`")]
pub struct BindError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// Binds the listener.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Serves `/metrics` until it is dropped.
pub async fn serve(listener: TcpListener, source: Source) {
    serve_within(listener, source, PATIENCE).await;
}

async fn serve_within(listener: TcpListener, source: Source, patience: Duration) {
    let router = Router::new()
        .route("/metrics", get(scrape))
        .fallback(|| async { (StatusCode::NOT_FOUND, "metrics are at /metrics\n") })
        .with_state(source);
    let service = TowerToHyperService::new(router);
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics cannot be served");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = service.clone();
        tokio::spawn(async move {
            let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
            builder.http1().keep_alive(false);
            if let Ok(Err(error)) = timeout(patience, builder.serve_connection(TokioIo::new(stream), service)).await {
                tracing::debug!(error, "metrics connection broke");
            }
            drop(permit);
        });
    }
}

async fn scrape(State(source): State<Source>, headers: HeaderMap) -> Response {
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match source().await {
        Ok(text) if accepts.contains("application/openmetrics-text") => {
            ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response()
        }
        Ok(text) => ([(header::CONTENT_TYPE, PROMETHEUS_TEXT)], prometheus_text(&text)).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// OpenMetrics in the older text format, which tools read that do not ask for OpenMetrics: there a counter's `_total` is
/// part of its name, and nothing has a unit.
pub fn prometheus_text(open_metrics: &str) -> String {
    let mut counters = Vec::new();
    for line in open_metrics.lines() {
        if let Some(name) = line.strip_prefix("# TYPE ").and_then(|rest| rest.strip_suffix(" counter")) {
            counters.push(name);
        }
    }
    let mut text = String::new();
    for line in open_metrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", kind @ ("HELP" | "TYPE"), name, rest] if counters.contains(&name) => {
                text.push_str(&format!("# {kind} {name}_total {rest}\n"));
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    const EXAMPLE: &str = "# HELP rampart_packets Packets.\n# TYPE rampart_packets counter\n\
                           rampart_packets_total{reason=\"no \\\"rule\\\"\"} 3\n\
                           # TYPE rampart_age_seconds gauge\n# UNIT rampart_age_seconds seconds\n\
                           rampart_age_seconds 7\n# EOF\n";

    fn example() -> Source {
        Arc::new(|| Box::pin(async { Ok(EXAMPLE.to_owned()) }))
    }

    async fn listening() -> (TcpListener, SocketAddr) {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    async fn get(address: SocketAddr, path: &str, headers: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // It ends although nobody asked for that.
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[test]
    fn the_older_format_names_counters_as_their_samples() {
        assert_eq!(
            prometheus_text(EXAMPLE),
            "# HELP rampart_packets_total Packets.\n# TYPE rampart_packets_total counter\n\
             rampart_packets_total{reason=\"no \\\"rule\\\"\"} 3\n\
             # TYPE rampart_age_seconds gauge\nrampart_age_seconds 7\n"
        );
    }

    /// Those who hold connections open wait for nothing but their end, and cost no more than their permits.
    #[tokio::test]
    async fn connections_are_bounded_and_end() {
        let (listener, address) = listening().await;
        let served = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&served);
        let source: Source = Arc::new(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Box::pin(async { Ok(EXAMPLE.to_owned()) })
        });
        let patience = Duration::from_millis(300);
        tokio::spawn(serve_within(listener, source, patience));
        let began = std::time::Instant::now();
        let mut silent = Vec::new();
        for _ in 0..CONCURRENT {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let answer = get(address, "/metrics", "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(began.elapsed() >= patience, "it waited for a permit");
        assert_eq!(served.load(std::sync::atomic::Ordering::Relaxed), 1);
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "it was closed");
        }
    }

    #[tokio::test]
    async fn a_scrape_gets_the_format_that_it_asks_for() {
        let (listener, address) = listening().await;
        tokio::spawn(serve(listener, example()));
        for (accept, expected) in
            [("application/openmetrics-text;version=1.0.0", "# EOF"), ("*/*", "# TYPE rampart_packets_total counter")]
        {
            let answer = get(address, "/metrics", &format!("Accept: {accept}\r\nConnection: close\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(expected), "{answer}");
        }
        assert!(get(address, "/", "").await.contains("metrics are at /metrics"));
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_named() {
        let (_listener, address) = listening().await;
        let error = bind(address).await.unwrap_err().to_string();
        assert!(error.contains(&format!("`{address}`")) && error.contains("--metrics"), "{error}");
    }
}
