//! How long the large things take: `cargo run --release -p policy --example scale -- 10000 100000`.
//!
//! Cidrs in a tree of three levels, a node in each of the smallest, and rules between random cidrs. Prints milliseconds.

use std::time::Instant;

use policy::{
    Action, Addresses, Cidr, CidrId, DefaultPolicy, Matrix, Mode, Network, NetworkParts, Node, NodeId, NodeState,
    Prefixes, PublicKey, Revision, Rule, RuleId, Selector, ServiceRef,
};

fn main() {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u32>().expect("a number"));
    let (cidrs, rules) = (numbers.next().unwrap_or(10_000), numbers.next().unwrap_or(100_000));
    for default in [DefaultPolicy::Deny, DefaultPolicy::Lineage] {
        measure(parts(cidrs, rules, default));
    }
}

fn measure(parts: NetworkParts) {
    println!("{} cidrs, {} rules, default {}", parts.cidrs.len(), parts.rules.len(), parts.default);
    let network = timed("load", || Network::from_parts(parts).expect("a valid network"));
    let matrix = timed("compile", || Matrix::compile(&network).expect("within limits"));
    timed("check", || matrix.check()).unwrap_or_else(|error| println!("  {error}: {}", error.limit));
    let node = network.nodes().values().next_back().expect("there are nodes").id;
    let old = timed("slice", || matrix.slice(node, Revision(1)).expect("an active node"));
    let new = timed("slice again", || matrix.slice(node, Revision(2)).expect("an active node"));
    let delta = timed("diff", || old.diff(&new));
    let mut held = old.clone();
    timed("apply", || held.apply(delta).expect("a valid delta"));
    println!(
        "  {} prefixes, {} cells, {} rules, {} peers in the slice",
        old.prefixes.len(),
        old.cells.len(),
        old.rules.len(),
        old.peers.len()
    );
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = run();
    println!("  {what:<12} {:9.3} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}

fn parts(cidrs: u32, rules: u32, default: DefaultPolicy) -> NetworkParts {
    let mut next_id = 0;
    let mut id = || {
        next_id += 1;
        next_id
    };
    let prefixes = |v4: String, v6: String| {
        let nets = [v4, v6].map(|text| text.parse().expect("a prefix"));
        Prefixes::from_nets(nets).expect("one of each family")
    };
    let mut parts = NetworkParts {
        name: "scale".parse().expect("a name"),
        roots: prefixes("10.0.0.0/8".into(), "fd42::/32".into()),
        default,
        next_id: 0,
        cidrs: Vec::new(),
        nodes: Vec::new(),
        groups: Vec::new(),
        services: Vec::new(),
        rules: Vec::new(),
    };
    for number in 0..cidrs {
        // One of 256 holds the others of its /16.
        let (high, low) = (number >> 8, number & 255);
        let prefixes = match low {
            0 => prefixes(format!("10.{high}.0.0/16"), format!("fd42:0:{high:x}::/48")),
            _ => prefixes(format!("10.{high}.{low}.0/24"), format!("fd42:0:{high:x}:{low:x}::/64")),
        };
        let name = format!("c{number}").parse().expect("a name");
        parts.cidrs.push(Cidr { id: CidrId(id()), name, prefixes, isolated: false, external: false });
        if low != 0 {
            let nets = prefixes.iter().filter_map(|prefix| prefix.hosts().nth(1));
            let mut key = [1; 32];
            key[..4].copy_from_slice(&number.to_be_bytes());
            parts.nodes.push(Node {
                id: NodeId(id()),
                name: format!("n{number}").parse().expect("a name"),
                addresses: Addresses::from_addresses(nets).expect("one of each family"),
                public_key: PublicKey::try_from(key).ok(),
                state: NodeState::Active,
                gateway_for: Default::default(),
                endpoint: None,
                expires_at: None,
            });
        }
    }
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).expect("small")
    };
    for number in 0..rules {
        let mut selector = || match random(8) {
            0 => Selector::Node(parts.nodes[random(parts.nodes.len())].id),
            _ => Selector::Cidr(parts.cidrs[random(parts.cidrs.len())].id),
        };
        let (from, to) = ([selector()].into(), [selector()].into());
        let service = format!("tcp/{}", random(65_536)).parse().expect("a service");
        parts.rules.push(Rule {
            id: RuleId(id()),
            name: format!("r{number}").parse().expect("a name"),
            action: if random(4) == 0 { Action::Deny } else { Action::Allow },
            from,
            to,
            services: vec![ServiceRef::Literal(service)],
            priority: random(3) as i32,
            both: random(4) == 0,
            mode: Mode::Enforce,
            log: false,
            expires_at: None,
            schedule: None,
            comment: String::new(),
        });
    }
    parts.next_id = id();
    parts
}
