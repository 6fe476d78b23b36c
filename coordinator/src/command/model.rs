//! `tabmesh-coordinator model`: brings in model files by policy, lists, describes and exports them. Offline.

use std::path::PathBuf;
use std::process::ExitCode;

use anstream::{print, println};
use clap::{Args, Subcommand, ValueEnum};
use miette::{IntoDiagnostic, WrapErr};
use serde_json::Value;
use tabmesh_contract::policy::ModelPurpose;

use super::files::{read, write};
use crate::cli::Output;
use crate::models::{Declaration, ModelStore, StoredModel};
use crate::policy_bundle;

/// What is done with models.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelAction {
    /// Checks a model file, asks the policy and keeps the file by its digest.
    ///
    /// Takes safetensors and torch checkpoints (.ckpt) of the public package, and this project's own model files.
    /// Refused, with the rule's name, if the licence doesn't permit the purpose.
    Import {
        /// The file.
        file: PathBuf,
        /// SPDX identifier of the weights' licence, e.g. BSD-3-Clause.
        #[arg(long)]
        licence: String,
        /// Where the file comes from, e.g. its address.
        #[arg(long)]
        source: String,
        /// What the model is for.
        #[arg(long, value_enum, default_value_t = Purpose::Commercial)]
        purpose: Purpose,
        /// Name for lists and cards; the file's name by default.
        #[arg(long)]
        name: Option<String>,
        /// Configuration (JSON) of a file that holds none.
        #[arg(long)]
        config: Option<PathBuf>,
        /// Folder of `.rego` and `.json` files; the built-in policy by default.
        #[arg(long)]
        policy: Option<PathBuf>,
        /// Folder of models, made if it isn't there.
        #[arg(long, visible_alias = "out", default_value = "models")]
        dir: PathBuf,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Lists the models.
    List {
        /// Folder of models.
        #[arg(long, default_value = "models")]
        dir: PathBuf,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Shows everything recorded of a model.
    Show {
        #[command(flatten)]
        which: Which,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Prints a model's card (Markdown).
    Card {
        #[command(flatten)]
        which: Which,
    },
    /// Writes a model to a file.
    Export {
        #[command(flatten)]
        which: Which,
        /// The file to write.
        #[arg(long)]
        out: PathBuf,
        /// Which bytes.
        #[arg(long, value_enum, default_value_t = Form::Tabmesh)]
        form: Form,
    },
}

/// A model of a folder.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Name, or at least the first 6 digits of the digest.
    model: String,
    /// Folder of models.
    #[arg(long, default_value = "models")]
    dir: PathBuf,
}

impl Which {
    fn find(&self) -> miette::Result<(ModelStore, StoredModel)> {
        let store = ModelStore::open(&self.dir)?;
        let model = store.find(&self.model)?;
        Ok((store, model))
    }
}

/// What a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// Any use, including a company's own.
    Commercial,
    /// Research that is published or teaches.
    Research,
    /// Trying out, without use of the results.
    Evaluation,
}

impl From<Purpose> for ModelPurpose {
    fn from(purpose: Purpose) -> Self {
        match purpose {
            Purpose::Commercial => Self::Commercial,
            Purpose::Research => Self::Research,
            Purpose::Evaluation => Self::Evaluation,
        }
    }
}

/// Which bytes an export writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// This project's model file, as `base_model` of a coordinator takes it.
    Tabmesh,
    /// The imported file.
    Original,
}

/// Runs one of the model commands; `now_ms` is the time of an import.
pub(crate) fn run(action: ModelAction, now_ms: i64) -> miette::Result<ExitCode> {
    match action {
        ModelAction::Import { file, licence, source, purpose, name, config, policy, dir, output } => {
            let bytes = read(&file)?;
            let config = config.map(|path| read(&path)).transpose()?;
            let config =
                config.map(String::from_utf8).transpose().into_diagnostic().wrap_err("configuration")?;
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            let name = name.unwrap_or_else(|| stem.into_owned());
            let declaration = Declaration { name, licence, source, purpose: purpose.into() };
            let policy = policy_bundle(policy.as_deref())?;
            let store = ModelStore::create(&dir)?;
            let model = store.import(&bytes, config.as_deref(), &declaration, &policy, now_ms)?;
            print(&model, output)?;
        }
        ModelAction::List { dir, output } => {
            let models = ModelStore::open(&dir)?.list()?;
            match output {
                Output::Json => println!("{}", serde_json::to_string(&models).into_diagnostic()?),
                Output::Text => models.iter().for_each(|model| println!("{}", line(model))),
            }
        }
        ModelAction::Show { which, output } => print(&which.find()?.1, output)?,
        ModelAction::Card { which } => print!("{}", card(&which.find()?.1)?),
        ModelAction::Export { which, out, form } => {
            let (store, model) = which.find()?;
            let bytes = match form {
                Form::Tabmesh => store.converted(&model)?,
                Form::Original => store.original(&model)?,
            };
            write(&out, &bytes)?;
            println!("{} bytes of {} in {}", bytes.len(), model.name, out.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn line(model: &StoredModel) -> String {
    let StoredModel { digest, name, licence, predicts, parameters, .. } = model;
    let short = digest.get(..12).unwrap_or(digest);
    format!("{short}  {name:<24} {licence:<16} {predicts:<10} {parameters} parameters")
}

fn print(model: &StoredModel, output: Output) -> miette::Result<()> {
    let facts = serde_json::to_value(model).into_diagnostic()?;
    match output {
        Output::Json => println!("{facts}"),
        Output::Text => {
            for (key, value) in facts.as_object().into_iter().flatten() {
                println!("{key:<12} {}", shown(value));
            }
        }
    }
    Ok(())
}

/// The card of a model: what it is, where it is from, what it may be used for, what it can't do.
fn card(model: &StoredModel) -> miette::Result<String> {
    let StoredModel { digest, purpose, container, parameters, policy, .. } = model;
    let [name, licence, source] = [&model.name, &model.licence, &model.source].map(|text| cell(text));
    let (classes, quantiles) = (model.config.max_classes, model.config.variant.num_quantiles);
    let predicts = if model.config.regression() {
        format!("{quantiles} quantiles of a number")
    } else {
        format!("up to {classes} classes in one pass, more by a tree of classes")
    };
    let config = serde_json::to_value(&model.config).into_diagnostic()?;
    let mut text = format!(
        "# {name}\n\n\
         | | |\n|---|---|\n\
         | SHA-256 | `{digest}` |\n| licence | {licence} |\n| source | {source} |\n| purpose | {purpose} |\n\
         | file | {container} |\n| parameters | {parameters} |\n| predicts | {predicts} |\n\
         | let in by policy | `{policy}` |\n\n\
         Weights of an in-context tabular model: it predicts from labelled context rows and is not trained on them. \
         Context rows shape predictions, so a context of private rows must not leave its domain. Licence and source \
         are as declared at import; nothing here verifies them.\n\n\
         ## Configuration\n\n| | |\n|---|---|\n"
    );
    for (key, value) in config.as_object().into_iter().flatten() {
        text.push_str(&format!("| {key} | {} |\n", shown(value)));
    }
    Ok(text)
}

fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Declared text as one cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(|c: char| c.is_control(), " ")
}
