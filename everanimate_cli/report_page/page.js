"use strict";
// Everything is there without this script; it only moves the players together.
const players = [...document.querySelectorAll(".players video")];
const bar = document.querySelector(".together");
const actions = {
  play: (player) => player.play(),
  pause: (player) => player.pause(),
  start: (player) => { player.currentTime = 0; },
};
if (bar) {
  bar.hidden = false;
  for (const button of bar.querySelectorAll("button")) {
    button.addEventListener("click", () => players.forEach(actions[button.dataset.action]));
  }
}
for (const link of document.querySelectorAll("a[data-seek-s]")) {
  link.addEventListener("click", () => {
    for (const player of players) {
      player.pause();
      player.currentTime = Number(link.dataset.seekS);
    }
  });
}
