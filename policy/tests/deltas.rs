//! Deltas: `old.apply(old.diff(new)) == new`, through any sequence of changes.

use policy::{Matrix, NodeId, Revision, Slice, arbitrary, interpret};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Breaks if a node that follows the stream ends elsewhere than one that gets the whole slice.
    #[test]
    fn a_followed_slice_is_the_built_one(
        (network, changes) in arbitrary::history(24),
        addresses in prop::collection::vec(any::<prop::sample::Index>(), 16),
    ) {
        let mut network = network;
        let mut held: std::collections::BTreeMap<NodeId, Slice> = Default::default();
        for (number, change) in changes.iter().enumerate() {
            let _refused = network.apply(change);
            let revision = Revision(number as u64 + 1);
            let matrix = Matrix::compile(&network).unwrap();
            for &node in network.nodes().keys() {
                let old = held.remove(&node);
                let Some(new) = matrix.slice(&network, revision, node, old.as_ref()) else { continue };
                prop_assert_eq!(new.validate(), Ok(()));
                let mut followed = new.clone();
                if let Some(old) = old {
                    followed = old.clone();
                    followed.apply(old.diff(&new)).unwrap();
                    prop_assert_eq!(&followed, &new);
                    let back = new.diff(&old);
                    let mut again = new.clone();
                    again.apply(back).unwrap();
                    prop_assert_eq!(&again, &old);
                }
                // Ids may differ from those of a slice made afresh; verdicts do not.
                let known = arbitrary::addresses(&network);
                let own = new.local.addresses.iter().next().unwrap();
                for address in addresses.iter().map(|index| *index.get(&known)) {
                    for (source, destination) in [(own, address), (address, own)] {
                        let flow = policy::Flow { source, destination, protocol: 6, port: 443 };
                        prop_assert_eq!(followed.verdict(&flow), interpret(&network, &flow));
                    }
                }
                held.insert(node, followed);
            }
        }
    }

    /// Breaks if a change that does not concern a node gives it something to hear: the same slice again is no delta.
    #[test]
    fn an_unchanged_slice_has_an_empty_delta(network in arbitrary::network()) {
        let matrix = Matrix::compile(&network).unwrap();
        for &node in network.nodes().keys() {
            let Some(old) = matrix.slice(&network, Revision(1), node, None) else { continue };
            let new = matrix.slice(&network, Revision(2), node, Some(&old)).unwrap();
            prop_assert!(old.diff(&new).is_empty());
        }
    }
}
