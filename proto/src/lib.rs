//! What crosses the wire between agents, coordinator, operators and auditors, and nothing else.
//!
//! The generated protobuf types are private to this crate: peers meet as [`identity::SpiffeId`]s, messages arrive as
//! the checked types of [`message`], and the only way to send table-derived bytes is [`client::MeshClient`], whose
//! submit functions take noised bytes together with the receipt of their ledger debit. What it refuses, it refuses
//! with a code of a closed list ([`status::WireError`]) that carries no values.
//!
//! Flow of a connection: [`accept`] (TLS 1.3, client certificate, SPIFFE id) → [`authorise`] (RPC × role) →
//! [`convert`] (parse, don't validate) → a service trait of [`server`].

#![forbid(unsafe_code)]

pub mod accept;
pub mod authorise;
pub mod client;
pub mod connect;
pub mod convert;
pub mod identity;
pub mod limits;
pub mod message;
pub mod server;
mod session;
pub mod signing;
pub mod status;
pub mod tls;

pub(crate) mod pb {
    //! Generated messages and service stubs of package `tabmesh.v1`.
    #![allow(
        missing_docs,
        unreachable_pub,
        unused_qualifications,
        clippy::all,
        reason = "generated code; the protobuf files document it"
    )]
    tonic::include_proto!("tabmesh.v1");
}

/// The protocol version this build speaks; a session between different versions is refused at hello.
pub const PROTOCOL_VERSION: u32 = 1;
