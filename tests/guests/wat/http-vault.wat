;; A `wasi:http` component that wants an interface which no node gives: acme:secret/vault.
(component
  (import "wasi:http/types@0.2.0" (instance $types
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))))
  (import "acme:secret/vault" (instance $vault
    (export "open" (func (result u32)))))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $out))
  (core func $open (canon lower (func $vault "open")))
  (core module $code
    (import "vault" "open" (func $open (result i32)))
    (func (export "handle") (param i32 i32) (drop (call $open))))
  (core instance $instance (instantiate $code
    (with "vault" (instance (export "open" (func $open))))))
  (func $handle (param "request" (own $request)) (param "response-out" (own $out))
    (canon lift (core func $instance "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))
