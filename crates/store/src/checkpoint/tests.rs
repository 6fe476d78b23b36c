//! Tests of signed checkpoints: golden notes, published examples, and what a reader must refuse.
#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::Value;

use super::*;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../tests/fixtures/merkle.json")).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// The published test key of the vectors.
fn owner(golden: &Value) -> Signer {
    let seed = hex::decode(text(&golden["checkpoints"]["private_seed_hex"])).unwrap();
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    Signer::from_pair(text(&golden["checkpoints"]["origin"]), KeyKind::Ed25519, Arc::new(pair)).unwrap()
}

fn witness(name: &str, seed: u8) -> Signer {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
    Signer::from_pair(name, KeyKind::CosignatureV1, Arc::new(pair)).unwrap()
}

fn open(note: &str, owner: &VerifierKey) -> Result<Checkpoint, CheckpointError> {
    Note::parse(note.as_bytes())?.open(owner, &[], 0).map(|(checkpoint, _)| checkpoint)
}

#[test]
fn golden_checkpoints_are_written_and_read_byte_for_byte() {
    let golden = golden();
    let signer = owner(&golden);
    assert_eq!(signer.verifier().to_string(), text(&golden["checkpoints"]["vkey"]));
    assert_eq!(VerifierKey::parse(text(&golden["checkpoints"]["vkey"])).unwrap(), *signer.verifier());
    let notes = golden["checkpoints"]["notes"].as_array().unwrap();
    assert_eq!(notes.len(), 10);
    for row in notes {
        let checkpoint = open(text(&row["note"]), signer.verifier()).unwrap();
        assert_eq!(checkpoint.size, row["size"].as_u64().unwrap());
        assert_eq!(checkpoint.to_text().unwrap(), text(&row["text"]));
        // Ed25519 is deterministic: signing gives the golden bytes.
        assert_eq!(Note::sign(&checkpoint, &signer).unwrap().to_string(), text(&row["note"]));
    }
    assert!(open(text(&golden["checkpoints"]["with_unknown_cosignature"]), signer.verifier()).is_ok());
}

#[test]
fn tampered_and_malformed_golden_notes_are_refused() {
    let golden = golden();
    let signer = owner(&golden);
    for row in golden["checkpoints"]["must_fail"].as_array().unwrap() {
        assert!(open(text(&row["note"]), signer.verifier()).is_err(), "{}", row["why"]);
    }
    for row in golden["checkpoints"]["signed_but_malformed_text"].as_array().unwrap() {
        assert!(open(text(&row["note"]), signer.verifier()).is_err(), "{}", row["why"]);
        assert!(Checkpoint::parse(text(&row["text"])).is_err(), "{}", row["why"]);
    }
}

#[test]
fn published_notes_verify() {
    let golden = golden();
    for row in golden["public_notes"].as_array().unwrap() {
        let key = VerifierKey::parse(text(&row["vkey"])).unwrap();
        let note = Note::parse(text(&row["note"]).as_bytes()).unwrap();
        assert_eq!(note.verify(&[&key]).unwrap()[0].name, key.name(), "{}", row["source"]);
        assert_eq!(note.to_string(), text(&row["note"]));
    }
    let example = &golden["c2sp_checkpoint_example"];
    let note = Note::parse(text(&example["note"]).as_bytes()).unwrap();
    let checkpoint = Checkpoint::parse(note.text()).unwrap();
    assert_eq!(checkpoint.origin, text(&example["origin"]));
    assert_eq!(checkpoint.size, example["size"].as_u64().unwrap());
    assert_eq!(checkpoint.root.to_string(), text(&example["root"]));
    assert_eq!(hex::encode(note.signatures[0].id), text(&example["key_id"]));
}

#[test]
fn witnesses_are_counted_once_a_key_and_only_if_known() {
    let golden = golden();
    let signer = owner(&golden);
    let owner_key = signer.verifier().clone();
    let (first, second) = (witness("w.example/1", 1), witness("w.example/2", 2));
    let renamed = witness("w.example/again", 1);
    let note = text(&golden["checkpoints"]["notes"][8]["note"]);
    let mut note = Note::parse(note.as_bytes()).unwrap();
    note.cosign(&first, 1_700_000_000).unwrap();
    note.cosign(&first, 1_700_000_001).unwrap();
    note.cosign(&renamed, 1_700_000_002).unwrap();
    let note = Note::parse(note.to_string().as_bytes()).unwrap();
    let known = [first.verifier(), second.verifier(), renamed.verifier()];
    let (checkpoint, cosigned) = note.open(&owner_key, &known, 1).unwrap();
    assert_eq!(checkpoint.size, 8);
    assert_eq!(cosigned.len(), 1, "one key under two names is one witness");
    assert_eq!(cosigned[0].time_s, 1_700_000_001, "the later statement replaced the earlier");
    assert_eq!(note.open(&owner_key, &known, 2), Err(CheckpointError::Witnesses { expected: 2, got: 1 }));
    assert_eq!(
        note.open(&owner_key, &[second.verifier()], 1),
        Err(CheckpointError::Witnesses { expected: 1, got: 0 })
    );

    // A cosignature covers its time and the text.
    let shown = note.to_string();
    let line = shown.lines().find(|line| line.contains("w.example/1")).unwrap();
    let encoded = line.rsplit(' ').next().unwrap();
    let mut bytes = STANDARD.decode(encoded).unwrap();
    bytes[4 + 7] ^= 1;
    let later = shown.replace(encoded, &STANDARD.encode(&bytes));
    let later = Note::parse(later.as_bytes()).unwrap();
    assert_eq!(
        later.open(&owner_key, &known, 1),
        Err(CheckpointError::Mismatch { name: "w.example/1".to_owned() })
    );
    // A witness alone doesn't make a checkpoint.
    let alone: String =
        shown.lines().filter(|line| !line.starts_with("— ledger")).map(|l| format!("{l}\n")).collect();
    let alone = Note::parse(alone.as_bytes()).unwrap();
    assert!(matches!(alone.open(&owner_key, &known, 1), Err(CheckpointError::Unsigned { .. })));
}

// Exactly as C2SP tlog-cosignature/v1 writes it.
#[test]
fn a_cosignature_covers_the_documented_message() {
    let signer = witness("w.example/1", 7);
    let text = "log.example\n3\nrra8/idLcKFPsGel5VeCZNsPqbUa9eC6FZFY8yngbnc=\n";
    let signature = signer.sign(text, 1_679_315_147);
    assert_eq!(signature.bytes.len(), 8 + 64);
    let message = format!("cosignature/v1\ntime 1679315147\n{text}");
    let key = UnparsedPublicKey::new(&ED25519, signer.verifier.key);
    key.verify(message.as_bytes(), &signature.bytes[8..]).unwrap();
}

#[test]
fn keys_are_used_for_what_they_are_for() {
    let golden = golden();
    let signer = owner(&golden);
    let witness = witness("w.example/1", 1);
    let checkpoint = Checkpoint {
        origin: "w.example/1".to_owned(),
        size: 0,
        root: crate::merkle::empty_root(),
        extensions: Vec::new(),
    };
    assert!(matches!(Note::sign(&checkpoint, &witness), Err(CheckpointError::Key { .. })));
    assert!(matches!(Note::sign(&checkpoint, &signer), Err(CheckpointError::Origin { .. })));
    let mut note = Note::parse(text(&golden["checkpoints"]["notes"][0]["note"]).as_bytes()).unwrap();
    assert!(matches!(note.cosign(&signer, 1), Err(CheckpointError::Key { .. })));
    for bad in [
        "",
        "a",
        "a+b",
        "a+00000000+AQ==",
        "a b+00000000+AQ==",
        "ledger.example/dev+40a35ecd+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4",
    ] {
        assert!(matches!(VerifierKey::parse(bad), Err(CheckpointError::Key { .. })), "{bad}");
    }
    for bad in ["two\nlines", "", "tab\there"] {
        let checkpoint = Checkpoint { extensions: vec![bad.to_owned()], ..checkpoint.clone() };
        assert!(checkpoint.to_text().is_err(), "{bad:?}");
    }
}

#[test]
fn limits_hold_at_one_too_many() {
    let golden = golden();
    let note = text(&golden["checkpoints"]["notes"][1]["note"]);
    let line = note.lines().last().unwrap();
    let repeated = |n: usize| {
        format!("{}{}", note.trim_end_matches(&format!("{line}\n")), format!("{line}\n").repeat(n))
    };
    assert!(Note::parse(repeated(MAX_SIGNATURES).as_bytes()).is_ok());
    assert!(Note::parse(repeated(MAX_SIGNATURES + 1).as_bytes()).is_err());
    let padded = |bytes: usize| format!("{}{note}", "x\n".repeat((bytes - note.len()) / 2));
    let even = MAX_NOTE_BYTES - (MAX_NOTE_BYTES - note.len()) % 2;
    assert!(Note::parse(padded(even).as_bytes()).is_ok());
    let got = even + 2;
    assert_eq!(Note::parse(padded(got).as_bytes()), Err(CheckpointError::TooLarge { got }));
}

#[test]
fn cosignatures_are_collected_in_the_order_of_their_names() {
    let golden = golden();
    let owner = owner(&golden);
    let root = Digest::of(b"root");
    let checkpoint =
        Checkpoint { origin: owner.verifier().name().to_owned(), size: 5, root, extensions: Vec::new() };
    let plain = Note::sign(&checkpoint, &owner).unwrap();
    let (a, b) = (witness("a.example", 1), witness("b.example", 2));
    let signed = |witness: &Signer, time_s| {
        let mut note = plain.clone();
        note.cosign(witness, time_s).unwrap();
        note
    };
    let collect = |order: [&Signer; 2]| {
        let mut note = plain.clone();
        for witness in order {
            note.take(witness.verifier(), &signed(witness, 7)).unwrap();
        }
        note
    };
    assert_eq!(collect([&a, &b]), collect([&b, &a]));
    let mut note = collect([&a, &b]);
    // A later signature replaces the earlier one.
    assert_eq!(note.take(a.verifier(), &signed(&a, 9)).unwrap().time_s, 9);
    let (_, found) = note.open(owner.verifier(), &[a.verifier(), b.verifier()], 2).unwrap();
    assert_eq!(found.iter().map(|s| s.time_s).collect::<Vec<_>>(), [9, 7]);

    let refused = |from: &Note, by: &Signer| plain.clone().take(by.verifier(), from).unwrap_err();
    assert!(matches!(refused(&plain, &a), CheckpointError::Unsigned { .. }));
    assert!(matches!(refused(&signed(&b, 7), &a), CheckpointError::Unsigned { .. }));
    assert!(matches!(refused(&plain, &owner), CheckpointError::Key { .. }));
    let longer = Note::sign(&Checkpoint { size: 6, ..checkpoint }, &owner).unwrap();
    assert!(matches!(refused(&longer, &a), CheckpointError::Text { .. }));
    let mut tampered = signed(&a, 7);
    tampered.signatures[1].bytes[20] ^= 1;
    assert!(matches!(refused(&tampered, &a), CheckpointError::Mismatch { .. }));
    let mut full = plain.clone();
    for i in 1..MAX_SIGNATURES {
        let one = witness(&format!("{i}.example"), u8::try_from(i).unwrap());
        full.take(one.verifier(), &signed(&one, 1)).unwrap();
    }
    let beyond = witness("z.example", 200);
    assert!(matches!(full.take(beyond.verifier(), &signed(&beyond, 1)), Err(CheckpointError::Note { .. })));
}
