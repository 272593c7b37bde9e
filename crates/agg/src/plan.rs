//! Takes requests whole, and changes nothing of them.

use stator_common::proto::worker::{Error, GenerateRequest, Leg};
use stator_worker::plan::{self, Plan};

/// What an aggregated worker does to requests.
#[derive(Clone, Copy, Debug)]
pub struct Agg;

impl Plan for Agg {
    fn request(&self, request: &mut GenerateRequest) -> Result<Leg, Error> {
        match plan::leg(request)? {
            leg @ (Leg::Unspecified | Leg::Local) => Ok(leg),
            leg @ (Leg::Prefill | Leg::Decode | Leg::Release) => {
                let why = "this worker is an aggregated one; it takes no part of a hand-off";
                Err(plan::wrong_leg(leg, why))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use stator_common::proto::worker::Code;

    use super::*;

    #[test]
    fn a_part_of_a_hand_off_is_refused_and_everything_else_is_taken_as_it_is() {
        for leg in [Leg::Prefill, Leg::Decode, Leg::Release] {
            let mut request = GenerateRequest {
                leg: leg.into(),
                ..GenerateRequest::default()
            };
            let error = Agg.request(&mut request).expect_err("refused");
            assert_eq!(
                (error.code(), &error.field[..]),
                (Code::InvalidRequest, "leg")
            );
        }
        for leg in [Leg::Unspecified, Leg::Local] {
            let request = GenerateRequest {
                request_id: "r".to_owned(),
                leg: leg.into(),
                ..GenerateRequest::default()
            };
            let mut taken = request.clone();
            assert_eq!(Agg.request(&mut taken), Ok(leg));
            assert_eq!(taken, request);
        }
        let mut unknown = GenerateRequest {
            leg: 99,
            ..GenerateRequest::default()
        };
        assert!(Agg.request(&mut unknown).is_err());
    }
}
