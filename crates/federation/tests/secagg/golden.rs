//! The wire form, pinned: an implementation in another language has to give these bytes.
//!
//! Made with Python 3.11 and `cryptography` 48: `hmac`/`hashlib` for HKDF-SHA256 and SHA-256,
//! `algorithms.ChaCha20` with a 16-byte nonce of counter 1 (little-endian 32 bits), four zero bytes and the chunk
//! number (little-endian 64 bits), and `ChaCha20Poly1305`. Secret: the bytes 0 to 31. Descriptor digest: SHA-256
//! of `descriptor`.

use std::collections::{BTreeMap, BTreeSet};

use tabmesh_federation::id::Digest;
use tabmesh_federation::secagg::consistency::Transcript;
use tabmesh_federation::secagg::graph::{Graph, seed};
use tabmesh_federation::secagg::keys::{
    Label, Nonce, Secret, commit, derive, pair_mask_key, seal, self_mask_key,
};
use tabmesh_federation::secagg::mask::{Keystream, RingVector, Sign, Width};
use tabmesh_federation::secagg::roster::Seat;
use tabmesh_federation::secagg::share::{Share, join};

use crate::world::seat;

fn secret() -> Secret {
    Secret::from_bytes(std::array::from_fn(|i| i as u8))
}

fn descriptor() -> Digest {
    Digest::of(b"descriptor")
}

#[test]
fn derived_keys() {
    let derived = [
        pair_mask_key(&secret(), &descriptor(), seat(7), seat(3)),
        self_mask_key(&secret(), &descriptor(), seat(3)),
        derive(&secret(), Label::Share, &descriptor(), [seat(7), seat(3)]),
    ]
    .map(|key| hex::encode(key.as_bytes()));
    assert_eq!(
        derived,
        [
            "7b54baf75a82257cad63576cd1cb9121239d309348f532f13bfddba8b05b8427",
            "6c7ae3d35274f4ce01191796af3cb863b5518117462091d4949efa9d06125105",
            "1f1171f1f7c4dbd1467ce0941dd1b31207fde33f4813d34159e7d9b61a86f825",
        ]
    );
}

#[test]
fn keystream() {
    for (chunk, expected) in [
        (0, "18b84231ade6a6d113615c61af434e27f8b1f3f5e1ad5b5cecf8fc122a35755c"),
        (5, "2308960a4525473e8baa394825b530a39e3e8345f45801087435a7b114f479ca"),
    ] {
        let mut bytes = [0; 32];
        Keystream::new(&secret()).fill(chunk, &mut bytes);
        assert_eq!(hex::encode(bytes), expected);
    }
    // A mask is that keystream as little-endian words; chunk 5 begins at byte 5 · 16384.
    for width in [Width::Bits32, Width::Bits64] {
        let mut vector = RingVector::zeros(width, 6 * 16_384 / width.bytes());
        vector.apply(&secret(), Sign::Plus);
        let bytes = vector.to_bytes();
        assert_eq!(hex::encode(&bytes[..8]), "18b84231ade6a6d1");
        assert_eq!(hex::encode(&bytes[5 * 16_384..][..8]), "2308960a4525473e");
    }
}

#[test]
fn commitments_and_sealing() {
    let expected = [
        (Label::SelfSeed, "ada1deff95e0dc7f533030f61537f4e4722745d29945a480c82f4ed9c02d45a8"),
        (Label::GraphNonce, "e435ac9987161a0beee0eb34ca944f5e59436cd851d1f5cee895cee7b16e2bf1"),
    ];
    for (label, digest) in expected {
        assert_eq!(commit(label, &descriptor(), seat(3), secret().as_bytes()).to_string(), digest);
    }
    let sealed = seal(&secret(), &descriptor(), seat(3), seat(7), b"shares");
    assert_eq!(hex::encode(sealed), "50297e442e191656b5009c264bbfe78f8b57cb4405e6");
}

#[test]
fn transcript() {
    let transcript = Transcript::begin(&descriptor())
        .senders(&BTreeSet::from([seat(1), seat(2)]))
        .survivors(&[(seat(2), descriptor())]);
    let json = serde_json::to_string(&transcript).unwrap();
    assert_eq!(json, r#""ae33adb7194de24a72954cbf58d0d7174c42754f7bab9e0c4042213179f952b9""#);
}

#[test]
fn graph_seed_and_order() {
    let nonce =
        |byte: u8| serde_json::from_str::<Nonce>(&format!("\"{}\"", hex::encode([byte; 32]))).unwrap();
    let seed = seed(&descriptor(), &BTreeMap::from([(seat(1), nonce(1)), (seat(4), nonce(4))]));
    assert_eq!(seed.to_string(), "852e283b805c8cb3b0c05e189edda7fb16489b48e16fd22b1ff239900b31cd62");
    let graph = Graph::regular(&(0..8).map(seat).collect(), 2, &seed);
    let ring = [7, 0, 4, 6, 1, 5, 2, 3];
    for (at, i) in ring.iter().enumerate() {
        let beside = BTreeSet::from([seat(ring[(at + 1) % 8]), seat(ring[(at + 7) % 8])]);
        assert_eq!(graph.neighbours(seat(*i)), &beside);
    }
}

// Shares of the secret at 1 and 5 on the polynomials limb_i + (2⁶⁰ + i)·x over 2⁶¹ − 1.
#[test]
fn shares() {
    let share = |text: &str| Share::from_bytes(&hex::decode(text).unwrap()).unwrap();
    let one = share(SHARE_0);
    let five = share(SHARE_4);
    let shares: [(Seat, &Share); 2] = [(seat(0), &one), (seat(4), &five)];
    assert_eq!(join(&shares, 2).unwrap(), secret());
}

const SHARE_0: &str = "0001020304050610718090a0b0c000100f0e0f101112031044516171819101101e1b1c1d1e1f0010";
const SHARE_4: &str = "0201020304050610778090a0b0c00010190e0f10111203105251617181910110301b1c1d1e1f0010";
