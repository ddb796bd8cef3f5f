//! A real Prometheus reads what the daemons say of themselves.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tests::mesh::{Mesh, START_LIMIT, wait_for};
use tests::metrics::{Page, fetch};
use tests::namespace::{Lifetime, Namespace};
use tests::scenario;

const PROMETHEUS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);

#[test]
fn prometheus_and_promtool_are_content() -> Result<()> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    scenario::build(&mut mesh, |_| ())?;
    scenario::allow(&mesh)?;
    let _servers = scenario::serve(&mesh)?;
    scenario::run(&mesh, &scenario::lines())?;

    check_with_promtool(&mesh.scrape_node("app1")?)?;
    check_with_promtool(&mesh.scrape_controller()?)?;

    let app = mesh.node("app1")?.namespace();
    let _of_node = Prometheus::start(app, "127.0.0.1:9586")?;
    for query in [
        "rampart_rule_packets_total{rule=\"web-to-app\"}",
        "rampart_packets_total{direction=\"ingress\",source=\"web\",destination=\"app\"}",
        "rampart_bytes_total",
        "rampart_policy_revision",
        "rampart_policy_generation",
        "rampart_controller_connected == 1",
        "rampart_build_info",
        "wireguard_sent_bytes_total{friendly_name=\"web1\"}",
        "wireguard_received_bytes_total{friendly_name=\"web1\"}",
        "wireguard_latest_handshake_seconds{interface=\"rampart0\",friendly_name=\"web1\"} > 1.7e9",
    ] {
        wait_for(query, START_LIMIT, || answers(app, query))?;
    }
    let _of_controller = Prometheus::start(mesh.controller(), "127.0.0.1:9587")?;
    wait_for("the controller's target", START_LIMIT, || answers(mesh.controller(), "up == 1"))?;
    wait_for("the controller's build", START_LIMIT, || answers(mesh.controller(), "rampart_build_info"))
}

/// Whether a query has a non-empty result.
fn answers(host: &Namespace, query: &str) -> Result<bool> {
    let escaped: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let Ok(body) = fetch(host, PROMETHEUS, &format!("/api/v1/query?query={escaped}")) else { return Ok(false) };
    let answer: serde_json::Value = serde_json::from_str(&body)?;
    let result = answer["data"]["result"].as_array().context("no result in Prometheus' answer")?;
    Ok(!result.is_empty())
}

fn check_with_promtool(page: &Page) -> Result<()> {
    use std::io::Write;
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("`promtool` is in the package prometheus; run `cargo xtask setup`")?;
    promtool.stdin.take().context("no stdin")?.write_all(page.text.as_bytes())?;
    let output = promtool.wait_with_output()?;
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    ensure!(output.status.success() && said.trim().is_empty(), "promtool: {said}\n{}", page.text);
    Ok(())
}

struct Prometheus(Child);

impl Prometheus {
    fn start(host: &Namespace, target: &str) -> Result<Self> {
        let config = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: rampart\n  static_configs:\n  - targets: ['{target}']\n"
        );
        host.enter(|| Ok(std::fs::write("/run/prometheus.yml", config)?))?;
        let mut command = Command::new("prometheus");
        command
            .args(["--config.file=/run/prometheus.yml", "--storage.tsdb.path=/run/prometheus"])
            .args(["--web.listen-address=127.0.0.1:9090", "--log.level=error"])
            .stdin(Stdio::null());
        Ok(Self(
            host.spawn(&mut command).context("`prometheus` is in the package prometheus; run `cargo xtask setup`")?,
        ))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
