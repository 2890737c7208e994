//! The same where etcd speaks TLS, wants to see certificates, and asks for passwords.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use colo_heartbeat::arbiter::etcd::{Credential, EtcdOptions, OptionsError};
use colo_heartbeat::arbiter::{Answer, Arbiter, Etcd as Right, Gateway, Register};
use tests::certificates::{Authority, Issued};
use tests::etcd::{Etcd, Guard};
use tests::harness::{Needs, Tests};
use tests::{Result, sample, vmm};

use super::{A, B, LONG, SHORT, loses_to, patient, side_with, soon, wins};

pub fn trials() -> Vec<Tests> {
    vec![
        Needs::NOTHING.test_etcd("right_is_had_of_an_etcd_that_speaks_tls", in_tls),
        Needs::NOTHING.test_etcd(
            "etcd_whose_certificate_is_another_authority_s_or_host_s_or_old_is_not_believed",
            wrong_server,
        ),
        Needs::NOTHING.test_etcd(
            "etcd_that_wants_a_certificate_is_shown_one_and_refuses_none_or_another_authority_s",
            client_certificates,
        ),
        Needs::NOTHING.test_etcd(
            "tls_and_plain_http_do_not_take_each_other_for_an_answer",
            mixed,
        ),
        Needs::NOTHING.test(
            "certificates_that_cannot_be_used_are_refused_by_the_file_s_name",
            unusable,
        ),
        Needs::NOTHING.test(
            "handshake_that_does_not_end_is_waited_for_until_the_deadline_only",
            handshakes,
        ),
        Needs::NOTHING.test_etcd("right_is_had_for_the_password_and_for_no_other", passwords),
        Needs::NOTHING.test_etcd(
            "token_that_is_forgotten_or_has_run_out_costs_nobody_the_right",
            tokens,
        ),
        Needs::NOTHING.test_etcd(
            "tokens_that_are_withdrawn_in_the_middle_of_claims_leave_one_winner_every_time",
            withdrawn,
        ),
        Needs::NOTHING.test_etcd(
            "etcd_that_falls_silent_in_the_middle_of_all_that_is_waited_for_until_the_deadline_only",
            silent,
        ),
        Needs::NOTHING.test_etcd(
            "certificates_and_passwords_that_are_replaced_meanwhile_are_read_again",
            replaced,
        ),
        Needs::NOTHING.test_etcd(
            "colo_vmm_that_etcd_will_not_be_content_with_does_not_start_and_says_why",
            refused_at_start,
        ),
    ]
}

const HERE: &str = "127.0.0.1";
const PASSWORD: &str = "open sesame";

/// What checks an etcd by this authority.
fn by(authority: &Authority) -> Result<EtcdOptions> {
    Ok(EtcdOptions::default().authority(Credential::file(authority.certificate())?))
}

fn showing(issued: &Issued, options: EtcdOptions) -> Result<EtcdOptions> {
    let chain = Credential::file(&issued.certificate)?;
    Ok(options.client(chain, Credential::file(&issued.key)?))
}

fn with_password(password: &str, options: EtcdOptions) -> EtcdOptions {
    options.user(Etcd::USER, Credential::new("the test", password))
}

/// One asks, and does not get an answer, for this reason.
fn refuses(endpoint: &str, options: EtcdOptions, why: &str) -> Result<()> {
    match side_with(endpoint, "colo/refused", A, LONG, options)?.claim(patient()) {
        Answer::Unreachable(error) if error.chain().contains(why) => Ok(()),
        Answer::Unreachable(error) => Err(error.chain().into()),
        other => Err(format!("instead of {why}: {other}").into()),
    }
}

/// Two share a right as they do without all this.
fn one_right(endpoint: &str, key: &str, options: &EtcdOptions) -> Result<()> {
    let mut owner = side_with(endpoint, key, A, LONG, options.clone())?;
    let mut other = side_with(endpoint, key, B, LONG, options.clone())?;
    wins(&owner.hold(patient()))?;
    wins(&owner.claim(patient()))?;
    loses_to(A, &other.claim(patient()))
}

fn in_tls(program: &Path) -> Result<()> {
    let authority = Authority::new()?;
    let server = authority.issue(&[HERE, "localhost"])?;
    let etcd = Etcd::start_guarded(program, Guard::by_tls(&server))?;
    let options = by(&authority)?;
    one_right(etcd.endpoint(), "colo/a", &options)?;
    let by_name = etcd.endpoint().replace(HERE, "localhost");
    one_right(&by_name, "colo/b", &options)
}

fn wrong_server(program: &Path) -> Result<()> {
    let (authority, another) = (Authority::new()?, Authority::new()?);
    let serving = |server: &Issued, options: EtcdOptions, why: &str| {
        let etcd = Etcd::start_guarded(program, Guard::by_tls(server))?;
        refuses(etcd.endpoint(), options, why)
    };
    let here = authority.issue(&[HERE])?;
    let why = "its certificate is not accepted: invalid peer certificate";
    serving(&here, by(&another)?, &format!("{why}: UnknownIssuer"))?;
    let elsewhere = authority.issue(&["elsewhere.example"])?;
    serving(
        &elsewhere,
        by(&authority)?,
        &format!("{why}: certificate not valid for name"),
    )?;
    let old = authority.issue_expired(&[HERE])?;
    serving(
        &old,
        by(&authority)?,
        &format!("{why}: certificate expired"),
    )
}

fn client_certificates(program: &Path) -> Result<()> {
    let (authority, clients) = (Authority::new()?, Authority::new()?);
    // As an operator has it: etcd's gateway is a client of its own etcd.
    let server = clients.issue(&[HERE])?;
    let trusted = clients.certificate();
    let etcd = Etcd::start_guarded(
        program,
        Guard {
            client_authority: Some(&trusted),
            ..Guard::by_tls(&server)
        },
    )?;
    let options = by(&clients)?;
    let client = clients.issue(&["client.example"])?;
    one_right(
        etcd.endpoint(),
        "colo/a",
        &showing(&client, options.clone())?,
    )?;
    let why = "it does not accept this side";
    refuses(etcd.endpoint(), options.clone(), why)?;
    let stranger = authority.issue(&["client.example"])?;
    refuses(etcd.endpoint(), showing(&stranger, options.clone())?, why)?;
    let old = clients.issue_expired(&["client.example"])?;
    refuses(etcd.endpoint(), showing(&old, options)?, why)
}

fn mixed(program: &Path) -> Result<()> {
    let authority = Authority::new()?;
    let server = authority.issue(&[HERE])?;
    let guarded = Etcd::start_guarded(program, Guard::by_tls(&server))?;
    let plainly = guarded.endpoint().replace("https://", "http://");
    refuses(&plainly, EtcdOptions::default(), "asking etcd at http://")?;
    let open = Etcd::start(program)?;
    let in_tls = format!("https://{}", open.endpoint());
    refuses(&in_tls, by(&authority)?, "no answer")
}

fn unusable() -> Result<()> {
    let authority = Authority::new()?;
    let (one, other) = (authority.issue(&[HERE])?, authority.issue(&[HERE])?);
    let dir = tempfile::tempdir()?;
    let damaged = dir.path().join("damaged.pem");
    let begin = "-----BEGIN CERTIFICATE-----\n";
    let end = "-----END CERTIFICATE-----\n";
    let options = by(&authority)?;
    let refusal = |options: EtcdOptions| -> Result<OptionsError> {
        match Gateway::new(&"https://127.0.0.1:1".parse()?, "k", options) {
            Ok(_) => Err("nothing was refused".into()),
            Err(error) => Ok(error),
        }
    };
    for content in [
        begin.to_owned(),
        format!("{begin}!!\n{end}"),
        format!("{begin}AAAA\n{end}"),
    ] {
        fs::write(&damaged, &content)?;
        let certificates = Credential::file(&damaged)?;
        let error = refusal(EtcdOptions::default().authority(certificates))?;
        let said = format!("{} is damaged", damaged.display());
        assert_eq!(error.to_string(), said, "{content}");
        let issued = Issued {
            certificate: damaged.clone(),
            key: one.key.clone(),
        };
        let error = refusal(showing(&issued, options.clone())?)?.to_string();
        assert!(
            error.contains(&damaged.display().to_string()),
            "{content}: {error}"
        );
    }
    let swapped = Issued {
        certificate: one.key.clone(),
        key: one.certificate.clone(),
    };
    let error = refusal(showing(&swapped, options.clone())?)?;
    assert!(
        matches!(error, OptionsError::NoCertificate { .. }),
        "{error}"
    );
    let keyless = Issued {
        key: one.certificate.clone(),
        ..one.clone()
    };
    let error = refusal(showing(&keyless, options.clone())?)?;
    assert!(matches!(error, OptionsError::NoKey { .. }), "{error}");
    let others = Issued {
        key: other.key.clone(),
        ..one
    };
    let error = refusal(showing(&others, options)?)?;
    assert_eq!(
        error.to_string(),
        format!(
            "the key in {} is of no use with the certificate in {}",
            others.key.display(),
            others.certificate.display()
        )
    );
    Ok(())
}

/// A server of nothing, and one that drips.
fn handshakes() -> Result<()> {
    let authority = Authority::new()?;
    for drips in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let endpoint = format!("https://{}", listener.local_addr()?);
        thread::spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            if drips {
                // A record of a handshake, with 16 KiB to come.
                stream.write_all(&[22, 3, 3, 0x40, 0])?;
                while stream.write_all(&[0]).is_ok() {
                    thread::sleep(Duration::from_millis(20));
                }
            }
            stream.read_to_end(&mut Vec::new())?;
            Ok(())
        });
        let mut key = Gateway::new(&endpoint.parse()?, "k", by(&authority)?)?;
        let deadline = soon();
        let error = key.read(deadline).expect_err("an answer of nobody's");
        assert!(Instant::now() >= deadline, "{}", error.chain());
        assert!(deadline.elapsed() < LONG);
        assert!(error.chain().contains("no answer"), "{}", error.chain());
    }
    Ok(())
}

fn passwords(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let options = |password| with_password(password, EtcdOptions::default());
    // It is not asked for yet.
    let mut early = side_with(etcd.endpoint(), "colo/early", A, LONG, options(PASSWORD))?;
    wins(&early.hold(patient()))?;
    etcd.enable_authentication(PASSWORD)?;
    wins(&early.hold(patient()))?;
    one_right(etcd.endpoint(), "colo/a", &options(PASSWORD))?;
    let why = r#"user "colo" is not authenticated: refused with status 400: etcdserver: authentication failed"#;
    refuses(etcd.endpoint(), options("another"), why)?;
    let nobody = EtcdOptions::default();
    refuses(
        etcd.endpoint(),
        nobody,
        "refused with status 400: etcdserver: user name is empty",
    )?;
    let mut others = side_with(etcd.endpoint(), "theirs", A, LONG, options(PASSWORD))?;
    match others.claim(patient()) {
        Answer::Unreachable(error) => {
            let why = "refused with status 403: etcdserver: permission denied";
            assert!(error.chain().contains(why), "{}", error.chain());
        }
        other => return Err(format!("{other}").into()),
    }
    Ok(())
}

fn tokens(program: &Path) -> Result<()> {
    const TTL: u32 = 1;
    let mut etcd = Etcd::start_guarded(
        program,
        Guard {
            token_ttl: Some(TTL),
            ..Guard::default()
        },
    )?;
    etcd.enable_authentication(PASSWORD)?;
    let side = |etcd: &Etcd, me| {
        let options = with_password(PASSWORD, EtcdOptions::default());
        side_with(etcd.endpoint(), "colo/a", me, LONG, options)
    };
    let (mut owner, mut other) = (side(&etcd, A)?, side(&etcd, B)?);
    wins(&owner.hold(patient()))?;
    look(&mut other);
    let token = etcd.token(Etcd::USER, PASSWORD)?;
    etcd.read(&token, "colo/a")?;
    let is_forgotten = |etcd: &Etcd| match etcd.read(&token, "colo/a") {
        Err(error) if error.to_string().contains("invalid auth token") => Ok(()),
        other => Err(format!("{other:?}")),
    };
    // Tokens that nobody uses run out, as a secondary's does.
    thread::sleep(Duration::from_secs(u64::from(TTL) * 3));
    is_forgotten(&etcd)?;
    wins(&owner.claim(patient()))?;
    loses_to(A, &other.claim(patient()))?;
    // One that starts again knows those that are in its log, and no others.
    etcd.kill()?;
    etcd.restart()?;
    wins(&owner.claim(patient()))?;
    loses_to(A, &other.claim(patient()))
}

/// Has one that owns nothing read the register, so that it has a token.
fn look(side: &mut Right) {
    side.release(patient());
}

fn withdrawn(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    etcd.enable_authentication(PASSWORD)?;
    let options = with_password(PASSWORD, EtcdOptions::default());
    let rounds = if sample::is_everything() { 60_u32 } else { 20 };
    for round in 0..rounds {
        let key = format!("colo/{round}");
        let side = |me| side_with(etcd.endpoint(), &key, me, LONG, options.clone());
        let mut primary = side(9)?;
        let mut sides = [side(A)?, side(B)?];
        wins(&primary.hold(patient()))?;
        for side in &mut sides {
            look(side);
        }
        primary.release(patient());
        let together = Barrier::new(3);
        let [mut a, mut b] = sides;
        let claim = |side: &mut Right| {
            together.wait();
            side.claim(patient())
        };
        let answers = thread::scope(|scope| -> Result<[Answer; 2]> {
            let claims = [scope.spawn(|| claim(&mut a)), scope.spawn(|| claim(&mut b))];
            together.wait();
            thread::sleep(Duration::from_micros(6000 / u64::from(rounds)) * round);
            etcd.change_password(PASSWORD)?;
            let [a, b] = claims.map(|claim| claim.join().expect("a thread that claims"));
            Ok([a, b])
        })?;
        match answers {
            [Answer::Won(_), lost] => loses_to(A, &lost)?,
            [lost, Answer::Won(_)] => loses_to(B, &lost)?,
            other => return Err(format!("round {round}: {other:?}").into()),
        }
    }
    Ok(())
}

fn silent(program: &Path) -> Result<()> {
    let authority = Authority::new()?;
    let server = authority.issue(&[HERE])?;
    let etcd = Etcd::start_guarded(program, Guard::by_tls(&server))?;
    etcd.enable_authentication(PASSWORD)?;
    let options = with_password(PASSWORD, by(&authority)?);
    for round in 0..8_u32 {
        let key = format!("colo/{round}");
        let mut side = side_with(etcd.endpoint(), &key, A, SHORT, options.clone())?;
        let claim = thread::spawn(move || {
            let deadline = Instant::now() + SHORT;
            let answer = side.claim(deadline);
            (side, answer, deadline.elapsed())
        });
        // In its handshake, its authentication or its claim.
        thread::sleep(Duration::from_millis(1) * round);
        etcd.freeze()?;
        let (mut side, answer, late) = claim.join().expect("a thread that claims");
        etcd.thaw()?;
        assert!(late < LONG, "round {round}: {late:?}");
        match answer {
            Answer::Won(_) | Answer::Unreachable(_) => {}
            other @ Answer::Lost(_) => return Err(format!("round {round}: {other}").into()),
        }
        wins(&side.claim(patient()))?;
    }
    Ok(())
}

fn replaced(program: &Path) -> Result<()> {
    let (first, second) = (Authority::new()?, Authority::new()?);
    let dir = tempfile::tempdir()?;
    let (ca, password) = (dir.path().join("ca.pem"), dir.path().join("password"));
    let served = first.issue(&[HERE])?;
    fs::copy(first.certificate(), &ca)?;
    fs::write(&password, PASSWORD)?;
    let mut etcd = Etcd::start_guarded(program, Guard::by_tls(&served))?;
    etcd.enable_authentication(PASSWORD)?;
    let options = EtcdOptions::default()
        .authority(Credential::file(&ca)?)
        .user(Etcd::USER, Credential::file(&password)?);
    let mut owner = side_with(etcd.endpoint(), "colo/a", A, LONG, options)?;
    wins(&owner.hold(patient()))?;
    // etcd comes back with a certificate of another authority, and then with another password.
    etcd.kill()?;
    let next = second.issue(&[HERE])?;
    fs::copy(&next.certificate, &served.certificate)?;
    fs::copy(&next.key, &served.key)?;
    etcd.restart()?;
    let hold = |owner: &mut Right, why: &str| match owner.hold(patient()) {
        Answer::Unreachable(error) if error.chain().contains(why) => Ok(()),
        other => Err(format!("instead of {why}: {other:?}")),
    };
    hold(&mut owner, "its certificate is not accepted")?;
    fs::copy(second.certificate(), &ca)?;
    wins(&owner.hold(patient()))?;
    etcd.change_password("another")?;
    hold(&mut owner, "is not authenticated")?;
    fs::write(&password, "another\n")?;
    wins(&owner.hold(patient()))?;
    wins(&owner.claim(patient()))
}

fn refused_at_start(program: &Path) -> Result<()> {
    let authority = Authority::new()?;
    let server = authority.issue(&[HERE])?;
    let etcd = Etcd::start_guarded(program, Guard::by_tls(&server))?;
    etcd.enable_authentication(PASSWORD)?;
    let dir = tempfile::tempdir()?;
    let password = dir.path().join("password");
    fs::write(&password, "another")?;
    let another = Authority::new()?;
    let arbiter = format!("etcd:{}", etcd.endpoint());
    for (ca, why) in [
        (
            authority.certificate(),
            r#"user "colo" is not authenticated"#,
        ),
        (another.certificate(), "its certificate is not accepted"),
    ] {
        let output = Command::new(vmm::program()?)
            .args(["run", "--sim", "--memory", "16", "--serial", "null"])
            .args(["--uuid", "8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a11"])
            .arg("--heartbeat")
            .arg(format!("unix:{}", dir.path().join("beat").display()))
            .args(["--on-heartbeat-loss", "ask", "--arbiter", &arbiter])
            .arg("--etcd-ca")
            .arg(ca)
            .args(["--etcd-user", Etcd::USER, "--etcd-password-file"])
            .arg(&password)
            .env("RUST_LOG", "trace")
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8(output.stderr)?;
        assert!(!output.status.success(), "{said}");
        assert!(said.contains(why), "{said}");
        assert!(!said.contains("another"), "{said}");
    }
    Ok(())
}
