//! Reads a daemon's OpenMetrics page as a scraper would.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub text: String,
    pub samples: Vec<Sample>,
}

/// One line of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Page {
    /// Scrapes `address` from inside a namespace.
    pub fn scrape(host: &Namespace, address: SocketAddr) -> Result<Self> {
        host.enter(|| Self::scrape_here(address))
    }

    /// Scrapes `address` from where this process is.
    pub fn scrape_here(address: SocketAddr) -> Result<Self> {
        let text = fetch_here(address, "/metrics")?;
        let samples = text.lines().filter_map(parse).collect();
        Ok(Self { text, samples })
    }

    /// The sum of all samples of `name` that carry these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples
            .iter()
            .filter(|sample| sample.name == name)
            .filter(|sample| {
                labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|seen| seen == value))
            })
            .map(|sample| sample.value)
            .sum()
    }
}

/// The body of what `address` answers to a GET of `path`, asked from inside a namespace.
pub fn fetch(host: &Namespace, address: SocketAddr, path: &str) -> Result<String> {
    host.enter(|| fetch_here(address, path))
}

fn fetch_here(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))
        .with_context(|| format!("nothing answers at `{address}`"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // 1.0: no chunks to put together.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").context("the response has no body")?;
    ensure!(head.contains(" 200 "), "`{address}{path}` answered {:?}", head.lines().next());
    Ok(body.to_owned())
}

/// `name{key="value",…} number`; comments and blank lines give nothing.
fn parse(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (series, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = series.split_once('{') else {
        return Some(Sample { name: series.to_owned(), labels: BTreeMap::new(), value });
    };
    let labels = labels
        .trim_end_matches('}')
        .split("\",")
        .filter_map(|label| label.split_once("=\""))
        .map(|(key, value)| (key.to_owned(), value.trim_end_matches('"').to_owned()))
        .collect();
    Some(Sample { name: name.to_owned(), labels, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_with_labels_is_read_whole() {
        let sample = parse(r#"rampart_packets_total{direction="egress",reason="no-rule"} 12"#).unwrap();
        assert_eq!(sample.name, "rampart_packets_total");
        assert_eq!(sample.labels["direction"], "egress");
        assert_eq!(sample.labels["reason"], "no-rule");
        assert_eq!(sample.value, 12.0);
        assert_eq!(parse("# HELP x y"), None);
        assert_eq!(parse("up 1").unwrap().value, 1.0);
    }
}
