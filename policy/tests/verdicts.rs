//! The compiled matrix and every slice of it say what the interpreter says, on random networks.

use policy::{Matrix, Revision, Slice, arbitrary, interpret};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Breaks if the compiler and docs/POLICY.md, section 2, part ways.
    #[test]
    fn compiled_equals_interpreted(
        (network, flows) in arbitrary::network().prop_flat_map(|network| {
            let flows = prop::collection::vec(arbitrary::flow(&network), 128);
            (Just(network), flows)
        })
    ) {
        let matrix = Matrix::compile(&network).unwrap();
        for flow in &flows {
            prop_assert_eq!(matrix.verdict(flow), interpret(&network, flow), "{}", flow);
        }
    }

    /// Breaks if a node would enforce something else than the matrix, or if its slice is not closed.
    #[test]
    fn a_slice_equals_the_matrix_and_the_interpreter(
        (network, flows) in arbitrary::network().prop_flat_map(|network| {
            let flows = match arbitrary::flow_at(&network) {
                Some(flow) => prop::collection::vec(flow, 64).boxed(),
                None => Just(Vec::new()).boxed(),
            };
            (Just(network), flows)
        })
    ) {
        let matrix = Matrix::compile(&network).unwrap();
        for (node, flow) in &flows {
            let slice = matrix.slice(*node, Revision(1)).unwrap();
            prop_assert_eq!(slice.validate(), Ok(()));
            if slice.stands_for(flow.source) || slice.stands_for(flow.destination) {
                prop_assert_eq!(slice.verdict(flow), interpret(&network, flow), "{}", flow);
                prop_assert_eq!(slice.verdict(flow), matrix.verdict(flow), "{}", flow);
            }
            for address in [flow.source, flow.destination] {
                let cidr = slice.lookup(address).map(|(_, cidr)| cidr);
                prop_assert_eq!(cidr, network.cidr_of(address).map(|cidr| cidr.id));
            }
            prop_assert_eq!(Slice::from_snapshot(slice.to_delta()), Ok(slice));
        }
    }
}
