//! A network is valid after every change, and what is refused leaves no trace.

use policy::{
    DefaultPolicy, GroupName, MemberSpec, Network, PublicKey, SelectorSpec, Service, ServiceId, ServiceRef,
    ServiceSpec, arbitrary, explain, interpret, parse_flow_service, parse_prefix,
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Breaks if a change checks less than a load does, leaves an index behind the objects, or is half-applied.
    #[test]
    fn a_changed_network_loads_as_it_is((network, changes) in arbitrary::history(40)) {
        let mut network = network;
        for change in &changes {
            let before = network.clone();
            match network.apply(change) {
                Ok(_) => prop_assert_eq!(&Network::from_parts(network.to_parts()).unwrap(), &network, "{:?}", change),
                Err(error) => {
                    prop_assert_eq!(&network, &before, "{:?}", change);
                    prop_assert!(!error.to_string().ends_with('.'));
                }
            }
        }
    }

    /// Breaks if the tree differs from what the prefixes say, or has no end.
    #[test]
    fn parents_contain_their_children(network in arbitrary::network()) {
        for cidr in network.cidrs().values() {
            let lineage = network.lineage_of(cidr.id);
            prop_assert_eq!(lineage[0], cidr.id);
            if let Some(parent) = network.parent_of(cidr.id) {
                prop_assert!(network.children_of(parent).contains(&cidr.id));
                let parent = network.cidrs()[&parent].prefixes;
                prop_assert!(cidr.prefixes.iter().any(|prefix| parent.iter().any(|outer| outer.contains(&prefix))));
            }
            for child in network.children_of(cidr.id) {
                prop_assert_eq!(network.parent_of(child), Some(cidr.id));
            }
        }
    }

    /// Breaks if an explanation says another verdict than the one that holds.
    #[test]
    fn an_explanation_has_the_verdict(
        (network, flow) in arbitrary::network().prop_flat_map(|network| {
            let flow = arbitrary::flow(&network);
            (Just(network), flow)
        })
    ) {
        let explanation = explain(&network, &flow);
        prop_assert_eq!(explanation.verdict, interpret(&network, &flow));
        prop_assert_eq!(explanation.source_cidr, network.cidr_of(flow.source).map(|cidr| cidr.id));
        prop_assert_eq!(explanation.destination_cidr, network.cidr_of(flow.destination).map(|cidr| cidr.id));
        let text = explanation.to_string();
        prop_assert!(text.contains(&explanation.verdict.action.to_string()));
        if let Some(rule) = explanation.verdict.rule {
            let name = &network.rules()[&rule].name;
            prop_assert!(text.contains(&format!("by rule `{name}`")), "{}", text);
        }
    }

    /// Breaks if something is not read back as it was printed.
    #[test]
    fn what_is_printed_parses(
        service in arbitrary::service(),
        selector in arbitrary::selector(),
        prefix in arbitrary::prefix(),
        name in "[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?",
        key in any::<[u8; 32]>(),
        id in 1_u32..,
        (protocol, port) in any::<(u8, u16)>(),
    ) {
        prop_assert_eq!(service.to_string().parse::<Service>(), Ok(service.clone()));
        let spec = ServiceSpec::Literal(service.clone());
        prop_assert_eq!(spec.to_string().parse::<ServiceSpec>(), Ok(spec));
        let spec = ServiceSpec::Named(name.parse().unwrap());
        prop_assert_eq!(spec.to_string().parse::<ServiceSpec>(), Ok(spec));
        for reference in [ServiceRef::Literal(service), ServiceRef::Named(ServiceId(id))] {
            prop_assert_eq!(reference.to_string().parse::<ServiceRef>(), Ok(reference));
        }
        prop_assert_eq!(selector.to_string().parse::<SelectorSpec>(), Ok(selector));
        prop_assert_eq!(parse_prefix(&prefix.to_string()), Ok(prefix));
        prop_assert_eq!(name.parse::<GroupName>().unwrap().to_string(), name.clone());
        for member in [MemberSpec::Node(name.parse().unwrap()), MemberSpec::Cidr(name.parse().unwrap())] {
            prop_assert_eq!(member.to_string().parse::<MemberSpec>(), Ok(member));
        }
        for default in [DefaultPolicy::Lineage, DefaultPolicy::Deny] {
            prop_assert_eq!(default.to_string().parse::<DefaultPolicy>(), Ok(default));
        }
        if let Ok(key) = PublicKey::try_from(key) {
            prop_assert_eq!(key.to_string().parse::<PublicKey>(), Ok(key));
        }
        let port = match protocol {
            1 | 58 => port % 256,
            6 | 17 => port,
            _ => 0,
        };
        let loopback = std::net::IpAddr::from([127, 0, 0, 1]);
        let flow = policy::Flow { source: loopback, destination: loopback, protocol, port };
        let text = flow.to_string();
        let service = text.rsplit(' ').next().unwrap();
        prop_assert_eq!(parse_flow_service(service), Ok((protocol, port)));
    }

    /// Breaks if a parser panics, or takes what it would not print.
    #[test]
    fn any_text_parses_or_is_refused(text in "\\PC{0,24}") {
        if let Ok(service) = text.parse::<Service>() {
            prop_assert_eq!(service.to_string().parse::<Service>(), Ok(service));
        }
        if let Ok(selector) = text.parse::<SelectorSpec>() {
            prop_assert_eq!(selector.to_string().parse::<SelectorSpec>(), Ok(selector));
        }
        let _: Result<(u8, u16), _> = parse_flow_service(&text);
        let _: Result<PublicKey, _> = text.parse();
    }
}
