//! The one table between refusals and gRPC statuses, in both directions.
//!
//! A refusal on the wire is a code of a closed list: no values, no counts, no free text, since what a peer learns
//! from an error is a release like any other. The full reason stays in the local log of whoever refused.

use prost::Message;
use tonic::{Code, Status};

use crate::pb::{self, RefusalCode};

macro_rules! wire_errors {
    ($($(#[$doc:meta])* $variant:ident, $refusal:ident, $code:ident, $text:literal;)*) => {
        /// Why a peer refused; the only reasons that cross the wire.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
        #[non_exhaustive]
        pub enum WireError {
            $($(#[$doc])* #[error($text)] $variant,)*
        }

        impl WireError {
            /// Every refusal.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            const fn row(self) -> (RefusalCode, Code, &'static str) {
                match self {
                    $(Self::$variant => (RefusalCode::$refusal, Code::$code, $text),)*
                }
            }

            fn from_refusal(code: RefusalCode) -> Option<Self> {
                match code {
                    RefusalCode::Unspecified => None,
                    $(RefusalCode::$refusal => Some(Self::$variant),)*
                }
            }
        }
    };
}

wire_errors! {
    /// The connection has no verified identity.
    Unauthenticated, Unauthenticated, Unauthenticated, "no verified identity";
    /// The peer's role may not call this.
    Role, Role, PermissionDenied, "the role of this certificate may not call this, plans and agents are for operators, reports for auditors";
    /// The message claims another domain, product or agent than the certificate allows.
    IdentityMismatch, IdentityMismatch, PermissionDenied, "message does not belong to this identity";
    /// The peers speak different protocol versions.
    ProtocolVersion, ProtocolVersion, FailedPrecondition, "protocol version not supported";
    /// The message does not parse.
    Malformed, Malformed, InvalidArgument, "malformed message";
    /// The message exceeds a size limit.
    TooLarge, TooLarge, ResourceExhausted, "message exceeds a limit";
    /// Bytes don't hash to the digest that came with them.
    DigestMismatch, DigestMismatch, DataLoss, "digest does not match";
    /// A signature does not verify.
    Signature, Signature, PermissionDenied, "signature does not verify";
    /// The thing named does not exist.
    NotFound, NotFound, NotFound, "not found";
    /// The data product is not admitted.
    NotAdmitted, NotAdmitted, FailedPrecondition, "data product is not admitted";
    /// The message belongs to a plan, stage or round that is over or was replaced.
    StalePlan, StalePlan, FailedPrecondition, "plan, stage or round is over";
    /// The message belongs to another attempt of its stage or round.
    WrongAttempt, WrongAttempt, FailedPrecondition, "wrong attempt";
    /// Something else was accepted under the same name before.
    Conflict, Conflict, AlreadyExists, "conflicts with what was accepted before";
    /// A ledger statement does not continue what was mirrored before.
    LedgerBroken, LedgerBroken, FailedPrecondition, "ledger does not continue";
    /// The deadline of the work has passed.
    DeadlinePassed, DeadlinePassed, DeadlineExceeded, "deadline has passed";
    /// The work was cancelled.
    Cancelled, Cancelled, Aborted, "cancelled";
    /// No frame arrived for several heartbeat intervals.
    HeartbeatMissed, HeartbeatMissed, DeadlineExceeded, "heartbeat missed";
    /// Too much is going on; try again later.
    Busy, Busy, ResourceExhausted, "busy, try again later";
    /// The server is stopping; try again elsewhere or later.
    ShuttingDown, ShuttingDown, Unavailable, "shutting down, try again later";
    /// The server can't be reached or can't do it now.
    Unavailable, Unavailable, Unavailable, "unavailable, try again later";
    /// The server failed; its log says why.
    Internal, Internal, Internal, "internal error";
}

impl WireError {
    /// Whether the same request may succeed later without any change. A retry sends the same bytes.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Busy | Self::ShuttingDown | Self::Unavailable)
    }

    /// A stable word for metrics and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.row().0.as_str_name().trim_start_matches("REFUSAL_CODE_")
    }
}

impl From<WireError> for Status {
    fn from(error: WireError) -> Self {
        let (refusal, code, text) = error.row();
        let details = pb::Refusal { code: refusal.into() }.encode_to_vec();
        Self::with_details(code, text, details.into())
    }
}

impl From<&Status> for WireError {
    /// Reads the code from the details; statuses made by the transport have none and are mapped by their gRPC code.
    fn from(status: &Status) -> Self {
        let refusal = pb::Refusal::decode(status.details()).ok();
        if let Some(error) = refusal.and_then(|refusal| Self::from_refusal(refusal.code())) {
            return error;
        }
        match status.code() {
            Code::Unauthenticated => Self::Unauthenticated,
            Code::PermissionDenied => Self::Role,
            Code::InvalidArgument => Self::Malformed,
            // tonic's own answer to a message above the decoding limit.
            Code::OutOfRange => Self::TooLarge,
            Code::ResourceExhausted => Self::Busy,
            Code::NotFound | Code::Unimplemented => Self::NotFound,
            Code::AlreadyExists => Self::Conflict,
            Code::DataLoss => Self::DigestMismatch,
            Code::FailedPrecondition => Self::StalePlan,
            Code::DeadlineExceeded => Self::DeadlinePassed,
            Code::Aborted => Self::Cancelled,
            Code::Ok | Code::Cancelled | Code::Unavailable | Code::Unknown => Self::Unavailable,
            Code::Internal => Self::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_refusal_survives_the_wire() {
        for error in WireError::ALL {
            let status = Status::from(*error);
            assert_eq!(WireError::from(&status), *error);
            assert_eq!(status.message(), error.to_string());
        }
    }

    #[test]
    fn the_table_names_every_refusal_code_once() {
        let mapped: BTreeSet<i32> = WireError::ALL.iter().map(|error| error.row().0 as i32).collect();
        assert_eq!(mapped.len(), WireError::ALL.len());
        let declared: BTreeSet<i32> = (1..100).filter(|n| RefusalCode::try_from(*n).is_ok()).collect();
        assert_eq!(mapped, declared);
    }

    #[test]
    fn refusals_carry_no_values() {
        for error in WireError::ALL {
            let status = Status::from(*error);
            assert!(
                status
                    .message()
                    .bytes()
                    .all(|byte| byte == b' ' || byte == b',' || byte.is_ascii_lowercase())
            );
            assert!(status.details().len() <= 2, "{error}");
        }
    }

    #[test]
    fn foreign_statuses_fall_back_to_their_code() {
        assert_eq!(WireError::from(&Status::out_of_range("too long")), WireError::TooLarge);
        assert_eq!(WireError::from(&Status::unimplemented("")), WireError::NotFound);
        let unknown_code = pb::Refusal { code: 999 }.encode_to_vec();
        let newer = Status::with_details(Code::Internal, "", unknown_code.into());
        assert_eq!(WireError::from(&newer), WireError::Internal);
    }

    #[test]
    fn only_passing_conditions_are_retryable() {
        let retryable: Vec<_> = WireError::ALL.iter().filter(|error| error.is_retryable()).collect();
        assert_eq!(retryable, [&WireError::Busy, &WireError::ShuttingDown, &WireError::Unavailable]);
        assert_eq!(WireError::TooLarge.as_str(), "TOO_LARGE");
    }
}
