// What the pages need a script for: dropping photos on them, and "/" to jump to the search box.
"use strict";

const form = document.querySelector("form.photo");
const input = form.querySelector("input");
const words = document.getElementById("q");

input.addEventListener("change", () => {
  if (input.files.length) form.requestSubmit();
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();  // otherwise the browser would open the photo
  document.body.classList.add("dropping");
});

document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});

document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (!event.dataTransfer.files.length) return;
  const first = new DataTransfer();  // the form takes one photo
  first.items.add(event.dataTransfer.files[0]);
  input.files = first.files;
  form.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target instanceof HTMLInputElement) return;
  event.preventDefault();
  words.select();
});
