//! Loads precompiled code: the one place where this crate needs `unsafe`.
//!
//! wasmtime runs precompiled code as it is, so that loading bytes of unknown origin would be running them on the node.
//! `VerifiedCode` exists only for what this process compiled or what carries this node's authentication code.
#![allow(unsafe_code)]

use crate::precompiled::VerifiedCode;
use wasmtime::component::Component;
use wasmtime::{Engine, Module};

pub fn component(engine: &Engine, code: &VerifiedCode) -> wasmtime::Result<Component> {
    // SAFETY: the code was made by `Engine::precompile_component` of this agent; see `VerifiedCode`.
    unsafe { Component::deserialize(engine, code.bytes()) }
}

pub fn module(engine: &Engine, code: &VerifiedCode) -> wasmtime::Result<Module> {
    // SAFETY: the code was made by `Engine::precompile_module` of this agent; see `VerifiedCode`.
    unsafe { Module::deserialize(engine, code.bytes()) }
}
